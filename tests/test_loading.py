"""Every form a checkpoint comes in is read; whatever does not fit is refused in one clear line."""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import (
    FIXTURES,
    VARIANTS,
    DialledDrafter,
    Forced,
    gap,
    mlx_lm_model,
    run_rounds,
    tiny,
    varied_tokens,
)
from mlx.utils import tree_flatten
from mlx_lm.convert import convert
from mlx_lm.tokenizer_utils import TokenizerWrapper
from safetensors.numpy import save_file

from mtp_mlx.checkpoint import Checkpoint
from mtp_mlx.draft_model import DraftModel
from mtp_mlx.errors import CheckpointError, PairError, RequestError
from mtp_mlx.generate import generate
from mtp_mlx.hub import DEMOS, find
from mtp_mlx.loading import load, load_pair
from mtp_mlx.model import Model
from mtp_mlx.models.gemma4_assistant import Assistant, mismatches
from mtp_mlx.models.qwen3_5 import Model as Qwen
from mtp_mlx.models.qwen3_5 import TextConfig
from mtp_mlx.ngram import NoDrafter
from mtp_mlx.pairs import choose_drafter
from mtp_mlx.sampling import Greedy

MODES: list[dict[str, Any]] = [
    {"q_mode": "affine", "q_bits": 4, "q_group_size": 32},
    {"q_mode": "affine", "q_bits": 8, "q_group_size": 64},
    {"q_mode": "mxfp4"},
    {"q_mode": "mxfp8"},
    {"q_mode": "nvfp4"},
]


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """A copy of the smallest pair, to be damaged."""
    return Path(shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "pair"))


def logits_of(folder: Path, tokens: list[int], dtype: mx.Dtype | None = mx.float32) -> mx.array:
    pair = load(folder, drafter=None, dtype=dtype)[0].pair
    forced = Forced(mx.array(tokens + [0] * 8))
    return run_rounds(pair.target, pair.drafter, forced, tokens[:5], len(tokens) - 5, 0)[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_drafter_in_the_targets_folder_is_found(variant: str) -> None:
    loaded = load_pair(str(FIXTURES / variant), "auto", mx.float32)
    assert isinstance(loaded.pair.drafter, Assistant)
    assert loaded.drafter == str(FIXTURES / variant / "assistant")
    assert loaded.tokenizer.eos_token_ids == {1, 319}


def test_no_drafter_is_plain_decoding_and_says_so(pair_folder: Path) -> None:
    shutil.rmtree(pair_folder / "assistant")
    loaded = load_pair(str(pair_folder))
    assert isinstance(loaded.pair.drafter, NoDrafter)
    assert "prompt lookup" in loaded.drafter_reason and "--drafter" in loaded.drafter_reason
    checkpoint = Checkpoint(Path(), {})
    assert choose_drafter("google/gemma-4-31B-it", checkpoint, "auto")[0] == "google/gemma-4-31B-it-assistant"
    assert choose_drafter("x", checkpoint, "none")[0] is None


# MLX 0.32.4 cannot look up one row of an nvfp4 table whose width is no multiple of 32 (here 80), so not with PLE.
QUANTISED = [(variant, mode) for variant in ("gemma4_ple", "gemma4_moe") for mode in MODES]
QUANTISED.remove(("gemma4_ple", {"q_mode": "nvfp4"}))


@pytest.mark.parametrize(("variant", "options"), QUANTISED, ids=str)
def test_checkpoints_quantised_by_mlx_lm_give_mlx_lms_logits(
    variant: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "converted"
    convert(str(FIXTURES / variant), str(folder), quantize=True, dtype="float32", **options)
    stored = mx.load(str(folder / "model.safetensors"))
    assert isinstance(stored, dict) and any(name.endswith(".scales") for name in stored)
    tokens = varied_tokens(40)
    theirs = mlx_lm_model(folder)
    logits = theirs(mx.array(tokens)[None])[0, 4:-1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert gap(logits_of(folder, tokens, None), expected) < 1e-3


def test_a_quantisation_that_differs_by_layer_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"

    def recipe(path: str, module: nn.Module, *_: object) -> bool | dict[str, Any]:
        if "down_proj" in path:
            return False
        return {"bits": 8, "group_size": 64} if "q_proj" in path else {"bits": 4, "group_size": 32}

    source = str(FIXTURES / "gemma4_unified")
    convert(source, str(folder), quantize=True, q_group_size=32, dtype="float32", quant_predicate=recipe)
    pair = load(folder, drafter=FIXTURES / "gemma4_unified" / "assistant", dtype=mx.float32)[0].pair
    layer = pair.target.model.layers[0]  # type: ignore[attr-defined]
    assert (layer.self_attn.q_proj.bits, layer.self_attn.k_proj.bits) == (8, 4)
    assert isinstance(layer.mlp.down_proj, nn.Linear)
    text = varied_tokens(50)
    forced = Forced(mx.array(text + [0] * 8))
    nobody = DialledDrafter.dial([], 0.0)
    _, expected, _ = run_rounds(pair.target, nobody, forced, text[:10], 35, 0)
    _, rows, _ = run_rounds(pair.target, pair.drafter, forced, text[:10], 35, 3)
    assert gap(rows, expected) < 2e-4


@pytest.mark.parametrize("head", ["assistant", "assistant_ordered"])
def test_a_quantised_assistant_is_read(head: str, tmp_path: Path) -> None:
    _, assistant = tiny("gemma4_keqv", head)
    folder = Path(shutil.copytree(FIXTURES / "gemma4_keqv" / head, tmp_path / head))
    # Quantise what was read from the fixture once more, from the file, as a converter would.
    original = mx.load(str(folder / "model.safetensors"))
    assert isinstance(original, dict)
    packed: dict[str, mx.array] = {}
    for name, array in original.items():
        if array.ndim == 2 and array.shape[-1] % 32 == 0:
            base = name.removesuffix(".weight")
            parts = mx.quantize(array.astype(mx.float32), group_size=32, bits=8)
            packed |= {f"{base}.{part}": a for part, a in zip(("weight", "scales", "biases"), parts, strict=True)}
        else:
            packed[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), packed)
    edit_config(folder, lambda config: config.update(quantization={"group_size": 32, "bits": 8}))
    pair = load(FIXTURES / "gemma4_keqv", drafter=folder, dtype=mx.float32)[0].pair
    prompt = varied_tokens(30)
    truth = run_rounds(pair.target, NoDrafter(), Greedy(), prompt, 20, 0)[0]
    assert run_rounds(pair.target, pair.drafter, Greedy(), prompt, 20, 4)[0] == truth
    assert pair.drafter.nbytes < assistant.nbytes


def test_stub_towers_of_other_modalities_are_left_out() -> None:
    names = json.loads((FIXTURES / "gemma4_moe" / "model.safetensors.index.json").read_text())["weight_map"]
    assert any("vision" in name for name in names) and any("audio" in name for name in names)
    target, _ = tiny("gemma4_moe")
    kept = dict(tree_flatten(target.parameters()))
    assert kept and not [name for name in kept if "vision" in name or "audio" in name]


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")


def _tensors(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict)
        mx.eval(list(tensors.values()))
        change(tensors)
        mx.save_safetensors(str(path), tensors)

    return apply


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, change)


def _double_precision(folder: Path) -> None:
    save_file({NORM: np.zeros(64, np.float64)}, folder / "model.safetensors")


def _text(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["text_config"].update(changes)


NORM = "model.language_model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_remove("config.json"), "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
    "no weights": (_remove("model.safetensors"), r"no model\*\.safetensors"),
    "truncated weights": (_cut_short, "damaged or cut short"),
    "not safetensors": (_not_safetensors, "damaged or cut short"),
    "no tokenizer": (_remove("tokenizer.json"), "no tokenizer.json"),
    "missing tensor": (_tensors(lambda t: t.pop(NORM)), r"lacks 1 tensor \(model\.norm\.weight\)"),
    "unknown tensor": (_tensors(lambda t: t.update({"model.surprise": mx.zeros(1)})), "model.surprise"),
    "misshapen tensor": (_tensors(lambda t: t.update({NORM: mx.zeros(7)})), r"has shape \(7,\)"),
    "unknown model_type": (
        _config(lambda c: c.update(model_type="qwen9")),
        "'qwen9'; supported targets: gemma4",
    ),
    "no model_type": (_config(lambda c: c.pop("model_type")), "supported targets"),
    "missing config entry": (
        _config(lambda c: c["text_config"].pop("hidden_size")),
        "lacks the entry 'hidden_size'",
    ),
    "unknown rope": (
        _config(lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(rope_type="yarn")),
        "'yarn'",
    ),
    "text_config is a list": (_config(lambda c: c.update(text_config=[1])), "cannot be used"),
    "size is a word": (_config(_text(hidden_size="64")), "hidden_size is '64'"),
    "no heads": (_config(_text(num_attention_heads=0)), "num_attention_heads is 0"),
    "no window": (_config(_text(sliding_window=0)), "sliding_window is 0"),
    "context is null": (_config(_text(max_position_embeddings=None)), "max_position_embeddings is None"),
    "every layer shares": (_config(_text(num_kv_shared_layers=6)), "share keys nobody has"),
    "more layers than kinds": (_config(_text(num_hidden_layers=7)), "layer_types must be 7 times"),
    "unknown layer type": (_config(_text(layer_types=["x"] * 6)), "layer_types must be"),
    "another activation": (_config(_text(hidden_activation="relu")), "hidden_activation is 'relu'"),
    "attention both ways": (_config(_text(use_bidirectional_attention="all")), "use_bidirectional_attention"),
    "rope is a word": (_config(_text(rope_parameters="x")), "cannot be used"),
    "end token is a word": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["x"]}'),
        "expected token ids",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer in .* cannot be read"),
    "quantisation is a word": (_config(lambda c: c.update(quantization="4bit")), "expected an object"),
    "weights are integers": (_tensors(lambda t: t.update({NORM: mx.zeros(64, mx.int32)})), "expected mlx.core.float"),
    "weights in float64": (_double_precision, "MLX cannot read"),
    "index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "expected an object",
    ),
    "index of pickles": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "weights.bin"}}'),
        "not safetensors",
    ),
    "foreign quantisation": (
        _config(lambda c: c.update(quantization_config={"quant_method": "gptq"})),
        "quantised with 'gptq'",
    ),
    "shard outside the folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
        "outside the folder",
    ),
    "missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        "is not there or no file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(damage: str, pair_folder: Path) -> None:
    apply, message = DAMAGE[damage]
    apply(pair_folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(pair_folder)
    assert str(pair_folder) in str(caught.value) and "\n" not in str(caught.value)


MISMATCHES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "hidden size": (lambda c: c.update(backbone_hidden_size=96), "hidden size 96, target has 64"),
    "vocabulary": (_text(vocab_size=512), "vocabulary 512, target has 320"),
    "window": (_text(sliding_window=32), "sliding window 32, target has 16"),
    "sliding KV heads": (_text(num_key_value_heads=4), "KV heads in sliding_attention 4, target has 2"),
    "full KV heads": (_text(num_global_key_value_heads=2), "KV heads in full_attention 2, target has 1"),
    "sliding head size": (_text(head_dim=64), "head size in sliding_attention 64, target has 16"),
    "full head size": (_text(global_head_dim=64), "head size in full_attention 64, target has 32"),
    "RoPE": (
        lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(rope_theta=5.0),
        "RoPE in full_attention",
    ),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_an_assistant_made_for_another_target_is_refused(mismatch: str, pair_folder: Path) -> None:
    change, message = MISMATCHES[mismatch]
    edit_config(pair_folder / "assistant", change)
    with pytest.raises(PairError, match="made for another target") as caught:
        load(pair_folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("drafter", [v for v in VARIANTS if v != "gemma4_ple"])
def test_the_assistant_of_another_variant_is_refused(drafter: str) -> None:
    with pytest.raises(PairError, match="KV heads"):
        load(FIXTURES / "gemma4_ple", drafter=FIXTURES / drafter / "assistant")


def test_a_drafter_that_reads_layers_the_target_lacks_is_refused() -> None:
    target, assistant = tiny("gemma4_keqv")
    kinds = target.config.layer_types
    alone = replace(target.config, layer_types=("full_attention",) * len(kinds))
    assert "layer types" in mismatches(assistant.network.config, alone)[0]


@pytest.mark.parametrize("ordering", ["zeros", "beyond"])
def test_a_token_ordering_that_is_no_permutation_is_refused(ordering: str, pair_folder: Path) -> None:
    """MLX does not check indices: a wrong table would read foreign memory."""
    folder = pair_folder / "assistant_ordered"
    name = "masked_embedding.token_ordering"
    table = mx.zeros(320, mx.int32) if ordering == "zeros" else mx.arange(320) + 10**8
    _tensors(lambda t: t.update({name: table}))(folder)
    with pytest.raises(CheckpointError, match="not a permutation"):
        load(pair_folder, drafter=folder)


def test_a_mistyped_drafter_is_noticed_before_the_target_is_read(pair_folder: Path) -> None:
    (pair_folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        load(pair_folder, drafter=pair_folder / "nowhere")


def test_an_empty_name_and_an_integer_dtype_are_refused() -> None:
    with pytest.raises(CheckpointError, match="name of a model is empty"):
        load("")
    with pytest.raises(RequestError, match="floating-point"):
        load(dtype=mx.int32)


def test_roles_cannot_be_swapped() -> None:
    with pytest.raises(CheckpointError, match="is a drafter; give its target"):
        load(FIXTURES / "gemma4_keqv" / "assistant")
    with pytest.raises(PairError, match="'qwen3_5', which does not draft for 'gemma4' targets"):
        load(FIXTURES / "gemma4_keqv", drafter=FIXTURES / "qwen3_5_tied")


@pytest.mark.parametrize(("target", "drafter"), [("gemma4_keqv", "gemma4_ple"), ("demo-qwen", "narrow")])
def test_a_smaller_model_of_the_family_drafts(target: str, drafter: str, tmp_path: Path) -> None:
    """Of Qwen, one that is not as wide as the target: another would be asked for its head."""
    if drafter == "narrow":
        folder, model = tmp_path / drafter, "demo-qwen"
        _narrow_qwen(folder)
    else:
        folder, model = FIXTURES / drafter, str(FIXTURES / target)
    loaded, tokenizer = load(model, drafter=folder, dtype=mx.float32)
    pair = loaded.pair
    assert isinstance(pair.drafter, DraftModel)
    texts = {generate(pair, tokenizer, "import os", max_tokens=12, depth=depth) for depth in (0, 3)}
    assert len(texts) == 1
    narrowed = load(model, drafter=folder, drafter_bits=8)[0].pair.drafter
    assert narrowed.nbytes < pair.drafter.nbytes / 2


def _narrow_qwen(folder: Path) -> None:
    """Half as wide as the second demo, with random weights and its tokenizer."""
    shutil.copytree(DEMOS["demo-qwen"], folder, ignore=shutil.ignore_patterns("*.safetensors"))

    def halve(config: dict[str, Any]) -> None:
        text = config.get("text_config", config)
        text["hidden_size"] //= 2

    edit_config(folder, halve)
    model = Qwen(TextConfig.from_dict(json.loads((folder / "config.json").read_text())))
    mx.save_safetensors(str(folder / "model.safetensors"), dict[str, mx.array](tree_flatten(model.parameters())))


def test_a_smaller_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = Path(shutil.copytree(FIXTURES / "gemma4_ple", tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    one, two = list(words)[5:7]
    words[one], words[two] = words[two], words[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PairError, match="another vocabulary than the target"):
        load(FIXTURES / "gemma4_keqv", drafter=other)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load("some-model")
    assert find("some-model") == Path("some-model")


def test_bfloat16_experts_on_the_cpu_are_refused_with_a_way_out() -> None:
    with pytest.raises(CheckpointError, match="--dtype float32"):
        load(FIXTURES / "gemma4_moe")


def test_load_is_mlx_lms_with_a_drafter() -> None:
    mine, expected = (inspect.signature(function).parameters for function in (load, mlx_lm.load))
    for ours, other in zip(mine.values(), expected.values(), strict=False):
        assert (ours.name, ours.kind) == (other.name, other.kind)
        assert ours.name == "path_or_hf_repo" or ours.default == other.default
    assert [name for name in mine if name not in expected] == ["drafter", "dtype", "drafter_bits", "kv_bits", "group"]
    folder = FIXTURES / "gemma4_keqv"
    model, tokenizer, config = load(folder, lazy=True, return_config=True, model_config={"model_type": "gemma4"})
    assert isinstance(model, Model) and isinstance(tokenizer, TokenizerWrapper)
    assert config == json.loads((folder / "config.json").read_text())
    assert load(folder, {"bos_token": "<eos>"})[1].bos_token == "<eos>" != tokenizer.bos_token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "leave trust_remote_code out"),
        ({"tokenizer_config": {"trust_remote_code": True}}, "leave trust_remote_code out"),
        ({"revision": "main"}, "--revision REVISION --local-dir FOLDER"),
        ({"model_config": {"model_type": "other"}}, "model_type 'other', its config.json says 'gemma4'"),
        ({"model_config": {"rope_scaling": {"factor": 4}}}, "config.json says nothing"),
    ],
)
def test_what_mlx_lm_would_load_otherwise_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(FIXTURES / "gemma4_keqv", **options)
