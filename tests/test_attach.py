"""A model that mlx-lm has loaded gets a drafter: its weights are shared, and the text stays mlx-lm's."""

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from conftest import FIXTURES, QWEN, VARIANTS, float32_copy, gap, mlx_lm_model, varied_tokens
from faces import theirs
from mlx.utils import tree_flatten
from mlx_lm.convert import convert
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

from mtp_mlx.attach import attach
from mtp_mlx.errors import CheckpointError, PairError, RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.hub import DEMOS
from mtp_mlx.model import Model
from mtp_mlx.models.gemma4_assistant import Assistant
from mtp_mlx.models.qwen3_5_mtp import Head
from mtp_mlx.ngram import NoDrafter

ALL = VARIANTS + [variant for variant in QWEN if not variant.endswith("sharded")]
TOLERANCE = 2e-4
PACKED = ("in_proj_qkv.", "in_proj_z.", "in_proj_b.", "in_proj_a.")  # of Qwen3-Next, in two pieces at mlx-lm
LORA = {"rank": 4, "scale": 2.0, "dropout": 0.5}


def tokens_(length: int = 40) -> mx.array:
    return mx.array(varied_tokens(length))[None]


def parameters(module: nn.Module) -> dict[str, mx.array]:
    found: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return found


def text_model(model: nn.Module) -> nn.Module:
    inner: nn.Module = model.children().get("language_model", model)
    return inner


@pytest.mark.parametrize("variant", ALL)
def test_every_weight_is_shared_and_the_logits_are_mlx_lms(variant: str) -> None:
    model = theirs(variant)
    mx.eval(parameters(model))
    before = mx.get_active_memory()
    attached = attach(model, None)
    mx.eval(parameters(attached))
    packed = {
        name for name in parameters(attached.target) if variant == "qwen3_next" and any(p in name for p in PACKED)
    }
    copied = sum(parameters(attached.target)[name].nbytes for name in packed)
    assert mx.get_active_memory() - before <= copied + 4096  # the angles of Gemma's positions
    known = parameters(text_model(model))
    for name, array in parameters(attached.target).items():
        if name not in packed:
            assert array is known[name], name
    assert bool(packed) == (variant == "qwen3_next")
    assert gap(attached(tokens_()), model(tokens_())) < TOLERANCE


@pytest.mark.parametrize("variant", ["gemma4_ple", "qwen3_5_dense"])
def test_the_text_is_mlx_lms_and_drafts_are_kept(variant: str) -> None:
    model, tokenizer = mlx_lm.load(str(DEMOS["demo" if variant in VARIANTS else "demo-qwen"]))  # type: ignore[misc]
    attached = attach(model, tokenizer=tokenizer)
    prompt = tokenizer.encode("Once upon a time")
    steps = generate_step(mx.array(prompt), model, max_tokens=20)
    wanted = [int(token) for token, _ in steps]
    got = list(stream_generate(attached.pair, tokenizer, prompt, max_tokens=20, depth=3))
    assert [response.token for response in got] == wanted[: len(got)]
    assert len(got) > 10 and sum(response.from_draft for response in got) > 3


AFFINE: dict[str, Any] = {"q_mode": "affine", "q_bits": 4, "q_group_size": 32}
QUANTISED = [
    ("gemma4_moe", AFFINE),
    ("qwen3_5_moe", {"q_mode": "mxfp4"}),
    ("qwen3_next", AFFINE),
    ("qwen3_next", {"q_mode": "mxfp8"}),
]


@pytest.mark.parametrize(("variant", "options"), QUANTISED, ids=str)
def test_quantised_weights_are_shared_as_they_are(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    source, folder = float32_copy(variant, tmp_path / "source"), tmp_path / "converted"
    convert(str(source), str(folder), quantize=True, dtype="float32", **options)
    model = mlx_lm_model(folder)
    attached = attach(model, None)
    mine, known = parameters(attached.target), parameters(text_model(model))
    assert any(name.endswith(".scales") for name in mine)
    assert all(mine[name] is known[name] for name in mine if not any(part in name for part in PACKED))
    assert gap(attached(tokens_()), model(tokens_())) < 1e-3


def test_each_layers_own_quantisation_is_kept(tmp_path: Path) -> None:
    def recipe(path: str, module: nn.Module, *_: object) -> bool | dict[str, Any]:
        if "down_proj" in path:
            return False
        return {"bits": 8, "group_size": 64} if "q_proj" in path else {"bits": 4, "group_size": 32}

    folder = tmp_path / "mixed"
    convert(str(FIXTURES / "gemma4_unified"), str(folder), quantize=True, dtype="float32", quant_predicate=recipe)
    model = mlx_lm_model(folder)
    attached = attach(model, None)
    layer: Any = attached.layers[0]
    assert (layer.self_attn.q_proj.bits, layer.self_attn.k_proj.bits) == (8, 4)
    assert isinstance(layer.mlp.down_proj, nn.Linear)
    assert gap(attached(tokens_()), model(tokens_())) < 1e-3


def adapted(variant: str, folder: Path, dora: bool = False) -> nn.Module:
    """A model with an adapter on all its layers that changes a lot."""
    model = mlx_lm_model(float32_copy(variant, folder / variant))
    linear_to_lora_layers(model, len(model.layers), LORA, use_dora=dora)
    mx.random.seed(0)
    moved = [
        (name, mx.random.normal(array.shape) * 0.1) for name, array in parameters(model).items() if "lora_b" in name
    ]
    model.load_weights(moved, strict=False)
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("variant", ["gemma4_ple", "qwen3_5_tied"])
def test_adapters_are_shared_and_go_on_learning(variant: str, dora: bool, tmp_path: Path) -> None:
    model = adapted(variant, tmp_path, dora)
    attached = attach(model, FIXTURES / variant / ("assistant" if variant in VARIANTS else ""))
    assert gap(attached(tokens_()), model(tokens_())) < TOLERANCE  # dropout is off in both
    assert gap(attached(tokens_()), theirs(variant)(tokens_())) > 1e-2
    before = attached(tokens_())
    mx.eval(before)
    name, array = next((n, a) for n, a in parameters(model).items() if n.endswith("lora_b") and "layers.0" in n)
    model.load_weights([(name, array + 0.3)], strict=False)
    assert gap(attached(tokens_()), before) > 1e-2
    assert gap(attached(tokens_()), model(tokens_())) < TOLERANCE


def test_an_adapter_on_packed_projections_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="fuse it"):
        attach(adapted("qwen3_next", tmp_path), None)


@pytest.mark.parametrize(("variant", "kind"), [("gemma4_keqv", Assistant), ("qwen3_5_dense", Head)])
def test_the_drafter_is_found_by_tokenizer_or_name(variant: str, kind: type) -> None:
    folder = FIXTURES / variant
    model, tokenizer = mlx_lm.load(str(folder))  # type: ignore[misc]
    assert isinstance(attach(model, tokenizer=tokenizer).pair.drafter, kind)
    by_name = attach(model, name=folder, kv_bits=8 if kind is Head else None)
    assert isinstance(by_name.pair.drafter, kind)
    assert by_name.pair.kv_bits == (8 if kind is Head else None)
    assert by_name.model_type == model.model_type
    assert isinstance(attach(model, None, tokenizer=tokenizer).pair.drafter, NoDrafter)
    assert isinstance(attach(model, "none", tokenizer=tokenizer).pair.drafter, NoDrafter)


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_dense"])
def test_without_a_name_and_of_unknown_shape_there_is_no_drafter_and_it_says_so(
    variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        attached = attach(theirs(variant))
    assert isinstance(attached.pair.drafter, NoDrafter)
    assert "no drafter: " in caplog.text and "prompt lookup" in caplog.text


def test_a_drafter_made_for_another_target_is_refused() -> None:
    with pytest.raises(PairError, match="another target"):
        attach(theirs("gemma4_keqv"), FIXTURES / "gemma4_ple" / "assistant")
    with pytest.raises(PairError, match="does not draft for"):
        attach(theirs("qwen3_5_dense"), FIXTURES / "gemma4_ple" / "assistant")
    with pytest.raises(CheckpointError):
        attach(theirs("gemma4_keqv"), "no/such/folder")


def test_what_cannot_be_attached_to_is_named() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_attention_heads": 2,
    }
    arguments = llama.ModelArgs(model_type="llama", rms_norm_eps=1e-6, vocab_size=32, **sizes)
    with pytest.raises(PairError, match=r"'llama' has no drafter here; supported are gemma4, .*qwen3_next"):
        attach(llama.Model(arguments))
    pair: Any = (llama.Model(arguments), "its tokenizer")  # as mlx_lm.load returns them
    with pytest.raises(PairError, match=r"builtins\.tuple is no language model of mlx-lm's"):
        attach(pair)
    with pytest.raises(PairError, match=r"mlx\.nn\.layers\.linear\.Linear is no language model of mlx-lm's"):
        attach(nn.Linear(2, 2))
    with pytest.raises(PairError, match="has a drafter already"):
        attach(attach(theirs("gemma4_keqv"), None))
    with pytest.raises(PairError, match=r"of type 'gemma4.*', .* holds one of type 'qwen3_5"):
        attach(theirs("gemma4_keqv"), name=FIXTURES / "qwen3_5_dense")
    with pytest.raises(RequestError, match="3 bits"):
        attach(theirs("qwen3_5_dense"), None, kv_bits=3)


def test_a_model_in_shards_or_with_strange_modules_is_refused(tmp_path: Path) -> None:
    model: Any = mlx_lm_model(FIXTURES / "gemma4_keqv")
    projection = model.layers[0].self_attn.q_proj
    whole = projection.weight
    projection.weight = whole[::2]
    with pytest.raises(PairError, match="several machines"):
        attach(model, None)
    projection.weight = whole
    model.layers[0].self_attn.q_proj = nn.Sequential(projection)
    with pytest.raises(PairError, match=r"layers\.0\.self_attn\.q_proj is a Sequential"):
        attach(model, None)


def test_a_pair_is_of_the_model_given() -> None:
    attached = attach(theirs("gemma4_keqv"), FIXTURES / "gemma4_keqv" / "assistant", drafter_bits=8)
    assert isinstance(attached, Model) and isinstance(attached.pair.drafter, Assistant)
    assert any(name.endswith(".scales") for name in parameters(attached.pair.drafter.network))


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_dense"])
def test_a_text_model_by_itself_will_do(variant: str) -> None:
    inner = text_model(theirs(variant))
    attached = attach(inner, None)
    assert attached.model_type in ("gemma4_text", "qwen3_5_text", "qwen3_5")
    assert gap(attached(tokens_()), theirs(variant)(tokens_())) < TOLERANCE
