"""The Qwen target against torch and transformers (golden values) and against mlx-lm (same weights)."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FIXTURES, QWEN, float32_copy, gap, golden, mlx_lm_model, plain, tiny_qwen, varied_tokens
from mlx.utils import tree_flatten
from mlx_lm.convert import convert

from mtp_mlx.cache import Cache
from mtp_mlx.checkpoint import Checkpoint
from mtp_mlx.errors import CheckpointError
from mtp_mlx.loading import load
from mtp_mlx.models.qwen3_5 import FULL, LINEAR, Model, TextConfig, is_raw
from mtp_mlx.types import Output, Span

# float32 against torch on tiny random networks, which amplify rounding: 7e-5 measured.
TOLERANCE = 1e-4
EXPERTS = ["qwen3_5_moe", "qwen3_5_moe_sharded", "qwen3_next"]
DENSE = ["qwen3_5_dense", "qwen3_5_tied"]
LENGTH = 24  # of a text for mlx-lm, whose recurrence on the CPU is a loop in Python


def close(mine: mx.array, theirs: np.ndarray) -> None:
    """Equal up to float32 rounding through a random network."""
    np.testing.assert_allclose(np.array(mine), theirs, rtol=TOLERANCE, atol=TOLERANCE)


def same(mine: mx.array, other: mx.array) -> bool:
    """Equal to the bit."""
    return mine.dtype == other.dtype and bool(mx.array_equal(mine, other))


def teacher_forced(model: Model, tokens: list[int], prompt: list[int], blocks: list[int]) -> tuple[Output, Cache]:
    """All outputs along a text: a prompt in chunks whose start the host knows, the rest in blocks, as in decoding."""
    cache = model.make_cache()
    cache.reserve(len(tokens) + 8)
    ids = mx.array(tokens)[None]
    outputs: list[Output] = []
    done = 0
    while done < len(tokens):
        reading = len(outputs) < len(prompt)
        length = prompt[len(outputs)] if reading else blocks[len(outputs) % len(blocks)]
        length = min(length, len(tokens) - done)
        span = Span(done, length) if reading else cache.span(length)
        outputs.append(model(ids[:, done : done + length], cache, span))
        cache.commit(length)
        done += length
    return Output(*(mx.concatenate([output[i] for output in outputs], axis=1) for i in range(2))), cache


@cache
def one_pass(variant: str) -> Output:
    """The golden text in one pass."""
    tokens = golden(variant)["tokens"].tolist()
    return teacher_forced(tiny_qwen(variant)[0], tokens, [len(tokens)], [])[0]


def logits_of(folder: Path, tokens: list[int], dtype: mx.Dtype | None = None) -> mx.array:
    """Logits of a checkpoint's target along a text, (T, V)."""
    pair = load(folder, drafter=None, dtype=dtype)[0].pair
    return pair.target(mx.array(tokens)[None], pair.target.make_cache(), Span(0, len(tokens))).logits[0]


def mlx_lm_logits(folder: Path, tokens: list[int]) -> mx.array:
    logits: mx.array = mlx_lm_model(folder)(mx.array(tokens)[None])[0]
    return logits


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """`change` is given the text part."""
    config = json.loads((folder / "config.json").read_text())
    change(config.get("text_config", config))
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(list(tensors.values()))
    change(tensors)
    mx.save_safetensors(str(path), tensors)


def stored_tensors(variant: str) -> dict[str, mx.array]:
    return Checkpoint.open(FIXTURES / variant).tensors()


# ---------------------------------------------------------------- the same numbers as transformers


@pytest.mark.parametrize("variant", QWEN)
def test_logits_and_hidden_equal_transformers(variant: str) -> None:
    expected, output = golden(variant), one_pass(variant)
    close(output.logits[0], expected["logits"])
    close(output.hidden[0], expected["hidden"])
    assert (np.array(output.logits[0]).argmax(-1) == expected["logits"].argmax(-1)).all()


@pytest.mark.parametrize("variant", QWEN)
def test_the_input_of_every_layer_equals_transformers(variant: str) -> None:
    model, _ = tiny_qwen(variant)
    expected = golden(variant)
    places, tokens = expected["layer_positions"].tolist(), mx.array(expected["tokens"])[None]
    cache, span = model.make_cache(), Span(0, tokens.shape[1])
    h = model.embed(tokens)
    for i, kind in enumerate(model.config.layer_types):
        close(h[0, places], expected["layer_inputs"][i])
        layer, full = model.model.layers[i], kind == FULL
        h = layer.attend(h, cache.attention(i), "causal", span) if full else layer.recur(h, cache.recurrent(i))
    close(h[0], expected["prenorm"])


# A convolution sees three rows before its own: chunks and blocks of one, two, three and more.
CHUNKINGS: list[tuple[list[int], list[int]]] = [
    ([], [1]),
    ([], [32]),
    ([5], [4]),
    ([1, 2, 1, 3], [2, 1, 3]),
    ([20, 7], [1, 3, 8]),
    ([1, 40], [1]),
]


@pytest.mark.parametrize("variant", QWEN)
@pytest.mark.parametrize(("prompt", "blocks"), CHUNKINGS, ids=str)
def test_how_a_text_is_cut_does_not_change_a_bit(variant: str, prompt: list[int], blocks: list[int]) -> None:
    whole = one_pass(variant)
    output, _ = teacher_forced(tiny_qwen(variant)[0], golden(variant)["tokens"].tolist(), prompt, blocks)
    assert same(output.logits, whole.logits) and same(output.hidden, whole.hidden)


@pytest.mark.parametrize("variant", QWEN)
@pytest.mark.parametrize("on_device", [False, True], ids=["int", "array"])
def test_rejected_rows_leave_no_trace(variant: str, on_device: bool) -> None:
    """Blocks of four rows, of which one to four are right and kept."""
    model, _ = tiny_qwen(variant)
    tokens = golden(variant)["tokens"].tolist()
    whole = one_pass(variant)
    _, cache = teacher_forced(model, tokens[:9], [9], [])
    done, kept = 9, 0
    while done + 4 <= len(tokens):
        kept = kept % 4 + 1
        wrong = [(token + 7) % 320 for token in tokens[done + kept : done + 4]]
        output = model(mx.array(tokens[done : done + kept] + wrong)[None], cache, cache.span(4))
        assert same(output.logits[:, :kept], whole.logits[:, done : done + kept])
        cache.commit(mx.array([kept]) if on_device else kept)
        done += kept


@pytest.mark.parametrize("variant", QWEN)
@pytest.mark.parametrize("length", [12, 30])
def test_greedy_decoding_continues_as_transformers_does(variant: str, length: int) -> None:
    expected = golden(variant)
    written = expected[f"greedy_{length}"].tolist()
    assert plain(tiny_qwen(variant)[0], expected[f"prompt_{length}"].tolist(), len(written)) == written


# ---------------------------------------------------------------- the same numbers as mlx-lm


@pytest.mark.parametrize("variant", QWEN)
def test_log_probabilities_and_hidden_equal_mlx_lms(variant: str, tmp_path: Path) -> None:
    """Its own copy is float32 on disk; ours is recast while it is loaded, before the 1 is added to a norm."""
    theirs = mlx_lm_model(float32_copy(variant, tmp_path / variant))
    tokens = varied_tokens(LENGTH)
    expected = nn.log_softmax(theirs(mx.array(tokens)[None]))
    output, _ = teacher_forced(tiny_qwen(variant)[0], tokens, [10], [3])
    assert gap(nn.log_softmax(output.logits), expected) < TOLERANCE
    assert gap(output.hidden, theirs.model(mx.array(tokens)[None])) < TOLERANCE


def _small_keys(folder: Path) -> None:
    """Queries and keys so short that what keeps them from a division by zero decides."""

    def shrink(tensors: dict[str, mx.array]) -> None:
        config = TextConfig.from_dict(Checkpoint.open(folder).config)
        rows = mx.arange(2 * config.key_width + config.value_width)[:, None]
        for name in tensors:
            if name.endswith("in_proj_qkv.weight"):
                tensors[name] = mx.where(rows < 2 * config.key_width, 1e-3, 1.0) * tensors[name]

    edit_tensors(folder, shrink)


def _rope(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda text: text["rope_parameters"].update(changes))


UNUSUAL: dict[str, Callable[[Path], object]] = {
    "short keys": _small_keys,
    "another eps": lambda folder: edit_config(folder, lambda text: text.update(rms_norm_eps=0.05)),
    "other angles": _rope(rope_theta=100.0, partial_rotary_factor=0.5),
    "stretched positions": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_checkpoint_gives_mlx_lms_logits(what: str, tmp_path: Path) -> None:
    """Each changes the logits of the fixture, so none is ignored."""
    folder, tokens = float32_copy("qwen3_5_tied", tmp_path / "copy"), varied_tokens(LENGTH)
    usual = logits_of(folder, tokens)
    UNUSUAL[what](folder)
    mine = logits_of(folder, tokens)
    assert gap(mine, usual) > 0.1
    assert gap(mine, mlx_lm_logits(folder, tokens)) < TOLERANCE


# ---------------------------------------------------------------- checkpoints converted by mlx-lm


@pytest.mark.parametrize("variant", QWEN)
def test_a_converted_checkpoint_gives_the_originals_logits(variant: str, tmp_path: Path) -> None:
    """Its norms hold the 1 already."""
    folder, tokens = tmp_path / "converted", varied_tokens(LENGTH)
    convert(str(FIXTURES / variant), str(folder), dtype="float32")
    assert is_raw(stored_tensors(variant)) is True
    assert is_raw(Checkpoint.open(folder).tensors()) is False
    mine = logits_of(folder, tokens)
    assert gap(mine, logits_of(FIXTURES / variant, tokens, mx.float32)) < 1e-6
    assert gap(mine, mlx_lm_logits(folder, tokens)) < TOLERANCE


# As convert takes them.
AFFINE_4 = {"q_bits": 4, "q_group_size": 32}
AFFINE_8 = {"q_bits": 8, "q_group_size": 64}
QUANTISED: list[tuple[str, dict[str, Any]]] = [
    *((variant, AFFINE_4) for variant in QWEN),
    *((variant, AFFINE_8) for variant in ("qwen3_5_tied", "qwen3_5_moe", "qwen3_next")),
    ("qwen3_5_moe", {"q_mode": "mxfp4"}),
]


@pytest.mark.parametrize(("variant", "options"), QUANTISED, ids=str)
def test_a_quantised_checkpoint_gives_mlx_lms_logits(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder, tokens = tmp_path / "converted", varied_tokens(LENGTH)
    convert(str(FIXTURES / variant), str(folder), quantize=True, dtype="float32", **options)
    own = [name for name in json.loads((folder / "config.json").read_text())["quantization"] if name.endswith("gate")]
    # Routers and the gates of shared experts have settings of their own.
    layers = tiny_qwen(variant)[0].config.layer_types
    assert len(own) == (2 * len(layers) if variant in EXPERTS else 0)
    mine = logits_of(folder, tokens)
    assert gap(mine, one_pass(variant).logits[0, :LENGTH]) > 0.1
    assert gap(mine, mlx_lm_logits(folder, tokens)) < 1e-3


@pytest.mark.parametrize("variant", ["qwen3_5_moe", "qwen3_next"])
def test_a_quantisation_that_differs_by_layer_is_read(variant: str, tmp_path: Path) -> None:
    """In Qwen3-Next the tensors that are named in the config are packed, those of the model are not."""
    folder, tokens = tmp_path / "mixed", varied_tokens(LENGTH)

    def recipe(path: str, module: nn.Module, *_: object) -> bool | dict[str, Any]:
        if "out_proj" in path:
            return False
        fine = "in_proj_qkv" in path or "gate" in path
        return {"bits": 8, "group_size": 64} if fine else {"bits": 4, "group_size": 32}

    convert(str(FIXTURES / variant), str(folder), quantize=True, dtype="float32", quant_predicate=recipe)
    pair = load(folder, drafter=None)[0].pair
    assert isinstance(pair.target, Model)
    mixer = pair.target.model.layers[0].linear_attn
    assert (mixer.in_proj_qkv.bits, mixer.in_proj_a.bits) == (8, 4)
    assert isinstance(mixer.out_proj, nn.Linear)
    assert gap(logits_of(folder, tokens), mlx_lm_logits(folder, tokens)) < 1e-3


@pytest.mark.parametrize("variant", QWEN)
def test_mlx_lm_weights_are_handed_over(variant: str) -> None:
    """Without a copy, but where Qwen3-Next packs two projections into one."""
    theirs = mlx_lm_model(FIXTURES / variant)
    ours = Model(tiny_qwen(variant)[0].config)
    weights = ours.sanitize(dict(tree_flatten(theirs.parameters())))
    mine = dict(tree_flatten(ours.parameters()))
    assert {name: array.shape for name, array in weights.items()} == {n: a.shape for n, a in mine.items()}
    mx.eval(list(weights.values()))
    before = mx.get_active_memory()
    ours.load_weights(list(weights.items()))
    del mine
    mx.eval(ours.parameters())
    assert mx.get_active_memory() <= before
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    tokens = mx.array(varied_tokens(LENGTH))[None]
    assert gap(ours(tokens, ours.make_cache(), Span(0, LENGTH)).logits, theirs(tokens)) < TOLERANCE


# ---------------------------------------------------------------- tensors and configs in their several forms


def test_tensors_of_other_parts_are_left_out() -> None:
    """The fixture has stubs of a vision tower and a head, as released; converters rename them."""
    model, _ = tiny_qwen("qwen3_5_moe_sharded")
    tensors = stored_tensors("qwen3_5_moe_sharded")
    others = {name for name in tensors if "visual" in name or name.startswith("mtp.")}
    assert {name.split(".")[0] for name in others} == {"model", "mtp"}
    kept = model.sanitize(tensors)
    assert kept.keys() == dict(tree_flatten(model.parameters())).keys()
    renamed = ("visual.merger.weight", "vision_tower.merger.weight", "language_model.mtp.fc.weight")
    assert model.sanitize(tensors | {name: mx.zeros(1) for name in renamed}).keys() == kept.keys()


def test_a_tied_output_head_that_is_stored_all_the_same_is_left_out() -> None:
    model, _ = tiny_qwen("qwen3_5_tied")
    assert "lm_head.weight" not in model.sanitize({"lm_head.weight": mx.zeros(1)})
    assert "lm_head.weight" in tiny_qwen("qwen3_5_dense")[0].sanitize({"language_model.lm_head.weight": mx.zeros(1)})


def test_norms_get_their_1_from_released_files_only_and_the_gated_norm_never() -> None:
    model, _ = tiny_qwen("qwen3_5_tied")
    raw = stored_tensors("qwen3_5_tied")
    once = model.sanitize(raw)
    twice = model.sanitize(once)
    assert once.keys() == twice.keys() and all(same(once[name], twice[name]) for name in once)
    for name, array in once.items():
        if array.ndim == 1 and "norm" in name:
            stored = raw[name.replace("model.", "model.language_model.", 1)]
            assert same(array, stored if "linear_attn" in name else stored + 1), name


def test_packed_projections_are_unpacked_by_key_head() -> None:
    """Two key heads of one row each with two value heads: q k v v z z | q k v v z z, and b b a a | b b a a."""
    config = replace(tiny_qwen("qwen3_next")[0].config, linear_key_head_dim=1, linear_value_head_dim=1)
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (2, 4)
    rows = mx.arange(12.0)[:, None]
    layer = "model.layers.0.linear_attn."
    packed = {f"{layer}in_proj_{part}": rows[:count] for part, count in (("qkvz.weight", 12), ("ba.scales", 8))}
    parts = {name.removeprefix(layer): array[:, 0].tolist() for name, array in Model(config).sanitize(packed).items()}
    assert parts == {
        "in_proj_qkv.weight": [0, 6, 1, 7, 2, 3, 8, 9],
        "in_proj_z.weight": [4, 5, 10, 11],
        "in_proj_b.scales": [0, 1, 4, 5],
        "in_proj_a.scales": [2, 3, 6, 7],
    }


def _split_experts(tensors: dict[str, mx.array]) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        prefix, _, fused = name.rpartition(".")
        array = tensors.pop(name)
        parts = mx.split(array, 2, axis=1) if fused == "gate_up_proj" else [array]
        for part, stack in zip(("gate_proj", "up_proj") if len(parts) == 2 else ("down_proj",), parts, strict=True):
            tensors |= {f"{prefix}.{e}.{part}.weight": expert for e, expert in enumerate(stack)}


def test_experts_one_by_one_are_those_in_one_tensor() -> None:
    model, _ = tiny_qwen("qwen3_5_moe")
    tensors = stored_tensors("qwen3_5_moe")
    fused = model.sanitize(tensors)
    _split_experts(tensors)
    assert "model.language_model.layers.1.mlp.experts.3.up_proj.weight" in tensors
    single = model.sanitize(tensors)
    assert single.keys() == fused.keys() and all(same(single[name], fused[name]) for name in fused)


def test_config_styles_mean_the_same_model() -> None:
    """The text part nested or alone; angles in a table or beside it; layer types listed or counted off."""
    nested = json.loads((FIXTURES / "qwen3_5_dense" / "config.json").read_text())
    text = nested["text_config"]
    released = TextConfig.from_dict(nested)
    assert released == TextConfig.from_dict(text)
    assert released.layer_types == ((LINEAR,) * 3 + (FULL,)) * 2
    older = {key: value for key, value in text.items() if key not in ("layer_types", "rope_parameters")}
    config = TextConfig.from_dict(older | {"rope_theta": 1e7, "rope_scaling": None})
    assert config.rotary_size == released.rotary_size == 8
    assert replace(config, rope=released.rope) == released
    assert config.rope["rope_theta"] == released.rope["rope_theta"]


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("variant", DENSE)
def test_in_bfloat16_the_decay_and_the_state_stay_float32(variant: str) -> None:
    pair = load(FIXTURES / variant, drafter=None, dtype=mx.bfloat16)[0].pair
    assert isinstance(pair.target, Model)
    stored = stored_tensors(variant)
    for name, array in dict(tree_flatten(pair.target.parameters())).items():
        assert array.dtype == (mx.float32 if name.endswith("A_log") else mx.bfloat16), name
        if name.endswith("A_log"):
            assert same(array, stored[name.replace("model.", "model.language_model.", 1)])
    output, cache = teacher_forced(pair.target, varied_tokens(8), [5], [3])
    assert output.logits.dtype == output.hidden.dtype == mx.bfloat16
    for i, kind in enumerate(pair.target.config.layer_types):
        if kind == LINEAR:
            tail, state = cache.recurrent(i).arrays()
            assert (tail.dtype, state.dtype) == (mx.bfloat16, mx.float32)


@pytest.mark.parametrize("variant", DENSE)
def test_in_bfloat16_a_block_of_rows_equals_single_rows(variant: str) -> None:
    pair = load(FIXTURES / variant, drafter=None, dtype=mx.bfloat16)[0].pair
    assert isinstance(pair.target, Model)
    tokens = varied_tokens(LENGTH)
    single, _ = teacher_forced(pair.target, tokens, [8], [1])
    for blocks in ([2], [5], [16]):
        output, _ = teacher_forced(pair.target, tokens, [8], blocks)
        assert same(output.logits, single.logits) and same(output.hidden, single.hidden)


@pytest.mark.parametrize("variant", EXPERTS)
@pytest.mark.parametrize("dtype", [None, mx.bfloat16])
def test_bfloat16_experts_on_the_cpu_are_refused_with_a_way_out(variant: str, dtype: mx.Dtype | None) -> None:
    with pytest.raises(CheckpointError, match=r"mixture of experts in mlx\.core\.bfloat16.*--dtype float32"):
        load(FIXTURES / variant, drafter=None, dtype=dtype)


# ---------------------------------------------------------------- what cannot be computed is refused


def _text(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda text: text.update(changes))


def _without(key: str) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda text: text.pop(key))


def _top(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return apply


def _tensors(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def _transpose_one_convolution(tensors: dict[str, mx.array]) -> None:
    tensors[CONV] = tensors[CONV].swapaxes(1, 2)


CONV = "model.language_model.layers.1.linear_attn.conv1d.weight"
NORM = "model.language_model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"
TIED, MOE, NEXT = "qwen3_5_tied", "qwen3_5_moe", "qwen3_next"
FLASH = "qwen4_exp.*another architecture"

DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "unknown layer type": (TIED, _text(layer_types=["x"] * 4), "layer_types must be 4 times"),
    "too few layer types": (TIED, _text(layer_types=[LINEAR, LINEAR, FULL]), "layer_types must be 4 times"),
    "more layers than types": (TIED, _text(num_hidden_layers=5), "layer_types must be 5 times"),
    "no full attention": (TIED, _text(layer_types=[LINEAR] * 4), "each at least once"),
    "an interval without full attention": (NEXT, _text(full_attention_interval=3), "each at least once"),
    "heads that cannot share": (TIED, _text(num_attention_heads=3), "3 heads cannot share 2 KV heads"),
    "linear heads that cannot share": (TIED, _text(linear_num_value_heads=3), "3 linear value heads cannot share 2"),
    "no heads": (TIED, _text(num_key_value_heads=0), "num_key_value_heads is 0"),
    "more chosen than there are": (MOE, _text(num_experts_per_tok=5), "num_experts_per_tok is 5, with 4 experts"),
    "none chosen": (MOE, _text(num_experts_per_tok=0), "num_experts_per_tok is 0, with 4 experts"),
    "neither experts nor a width": (TIED, _without("intermediate_size"), "intermediate_size is missing"),
    "another activation": (TIED, _text(hidden_act="gelu"), "hidden_act is 'gelu', only 'silu'"),
    "no output gate": (TIED, _text(attn_output_gate=False), "attn_output_gate is False, only True"),
    "attention with a bias": (TIED, _text(attention_bias=True), "attention_bias is True"),
    "a state in bfloat16": (TIED, _text(mamba_ssm_dtype="bfloat16"), "mamba_ssm_dtype is 'bfloat16'"),
    "weights of experts as they are": (NEXT, _text(norm_topk_prob=False), "norm_topk_prob is False"),
    "experts in every other layer": (NEXT, _text(decoder_sparse_step=2), "decoder_sparse_step is 2"),
    "a layer without experts": (NEXT, _text(mlp_only_layers=[0]), r"mlp_only_layers is \[0\]"),
    "no linear key heads": (TIED, _without("linear_num_key_heads"), "lacks the entry 'linear_num_key_heads'"),
    "no width": (TIED, _without("hidden_size"), "lacks the entry 'hidden_size'"),
    "no angles": (TIED, _without("rope_parameters"), "lacks the entry 'rope_theta'"),
    "no expert width": (MOE, _without("moe_intermediate_size"), "lacks the entry 'moe_intermediate_size'"),
    "width is a word": (TIED, _text(hidden_size="64"), "hidden_size is '64', expected a whole number"),
    "head size is a word": (TIED, _text(linear_key_head_dim="32"), "linear_key_head_dim is '32'"),
    "experts are a word": (MOE, _text(num_experts="4"), "num_experts is '4'"),
    "context is null": (TIED, _text(max_position_embeddings=None), "max_position_embeddings is None"),
    "tied is a word": (TIED, _text(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', expected true or false"),
    "no eps": (TIED, _text(rms_norm_eps=0), "rms_norm_eps is 0"),
    "unknown rope": (TIED, _rope(rope_type="spiral"), "spiral"),
    "more turned than a head holds": (TIED, _rope(partial_rotary_factor=2), "partial_rotary_factor turns 64 of 32"),
    "an odd number turned": (TIED, _text(head_dim=31), "partial_rotary_factor turns 7 of 31"),
    "an angle that is a word": (TIED, _rope(rope_theta="x"), "rope_theta is 'x', expected a number above 0"),
    "no angle": (TIED, _rope(rope_theta=0), "rope_theta is 0, expected a number above 0"),
    "a share that is a word": (TIED, _rope(partial_rotary_factor="0.25"), "partial_rotary_factor is '0.25'"),
    "angles that depend on the block": (TIED, _rope(rope_type="dynamic"), "rope_type is 'dynamic', only default"),
    "angles are a word": (TIED, _text(rope_parameters="yes"), "rope_parameters is 'yes', expected an object"),
    "eps is a word": (TIED, _text(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', expected a number"),
    "layer types are a number": (TIED, _text(layer_types=5), "layer_types must be 4 times"),
    "layer types are lists": (TIED, _text(layer_types=[["x"]] * 4), "layer_types must be 4 times"),
    "no linear attention": (TIED, _text(layer_types=[FULL] * 4), "each at least once"),
    "no interval": (NEXT, _text(full_attention_interval=0), "full_attention_interval is 0"),
    "a kernel of one row": (TIED, _text(linear_conv_kernel_dim=1), "linear_conv_kernel_dim is 1"),
    "another output gate": (TIED, _text(output_gate_type="sigmoid"), "output_gate_type is 'sigmoid'"),
    "experts without a width": (MOE, _text(moe_intermediate_size=0), "moe_intermediate_size is missing or 0"),
    "a shared expert without one": (MOE, _text(shared_expert_intermediate_size=0), "shared_expert_intermediate_size"),
    "FP8, packed": (NEXT, _top(quantization_config={"quant_method": "fp8"}), "quantised with 'fp8'"),
    "text_config is a list": (TIED, _top(text_config=[1]), r"text_config is \[1\], expected an object"),
    "an endless angle": (TIED, _rope(rope_theta=float("inf")), "rope_theta is inf, expected a number above 0"),
    "Flash-Next": (TIED, _top(model_type="qwen4_exp"), FLASH),
    "Flash-Next, text only": (TIED, _top(model_type="qwen4_exp_text"), FLASH),
    "Flash-Next under another name": (TIED, _text(model_type="qwen4_exp_text"), FLASH),
    "FP8": (TIED, _top(quantization_config={"quant_method": "fp8"}), "quantised with 'fp8'"),
    "missing tensor": (TIED, _tensors(lambda t: t.pop(NORM)), r"lacks 1 tensor \(model\.norm\.weight\)"),
    "unknown tensor": (TIED, _tensors(lambda t: t.update({"model.surprise": mx.zeros(1)})), "model.surprise"),
    "misshapen tensor": (TIED, _tensors(lambda t: t.update({NORM: mx.zeros(7)})), r"norm\.weight has shape \(7,\)"),
    "another kernel": (TIED, _text(linear_conv_kernel_dim=3), r"conv1d\.weight has shape \(256, 4, 1\)"),
    "two layouts": (TIED, _tensors(_transpose_one_convolution), "conv1d tensors are laid out partly as released"),
    "an expert is missing": (NEXT, _tensors(lambda t: t.pop(EXPERT.format(1))), "up_proj.weight lacks expert 1 of 4"),
    "the last expert is missing": (NEXT, _tensors(lambda t: t.pop(EXPERT.format(3))), r"has shape \(3, 32, 64\)"),
    "an untied head that is not there": (TIED, _text(tie_word_embeddings=False), r"lacks 1 tensor \(lm_head\.weight\)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_computed_is_named(damage: str, tmp_path: Path) -> None:
    variant, apply, message = DAMAGE[damage]
    folder = Path(shutil.copytree(FIXTURES / variant, tmp_path / "copy"))
    apply(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, drafter=None, dtype=mx.float32)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
