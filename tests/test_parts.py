"""What one machine computes, added up over all machines, is what one machine would have computed alone."""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import FIXTURES, gap
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from mtp_mlx.cache import RecurrentCache
from mtp_mlx.loading import load
from mtp_mlx.models import gemma4, parts, qwen3_5
from mtp_mlx.models.base import weight_bytes
from mtp_mlx.models.parts import Heads, Part
from mtp_mlx.types import Span

FORMS: list[tuple[int, int, str] | None] = [
    None,
    *((64 if bits % 2 == 0 else 32, bits, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    (32, 4, "mxfp4"),
    (16, 4, "nvfp4"),
    (32, 8, "mxfp8"),
]


def machines(size: int) -> list[Part]:
    return [Part(rank, size) for rank in range(size)]


def gated(width: int, inner: int, form: tuple[int, int, str] | None, experts: int = 0) -> nn.Module:
    mx.random.seed(0)
    mlp = SwitchGLU(width, inner, experts) if experts else qwen3_5.MLP(width, inner)
    if form is not None:
        nn.quantize(mlp, *form[:2], mode=form[2])
    return mlp


@pytest.mark.parametrize("length", [1, 5, 64, 704])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("step", [1, 4, 64])
def test_parts_cover_a_length_once_in_the_order_of_ranks(length: int, size: int, step: int) -> None:
    own = [part.of(length, step) for part in machines(size)]
    if length % step or length // step < size:
        assert own == [None] * size
        return
    ranges = [each for each in own if each is not None]
    assert ranges[0].start == 0 and ranges[-1].stop == length
    assert all(left.stop == right.start for left, right in pairwise(ranges))
    assert all(len(each) and each.start % step == 0 for each in ranges)


@pytest.mark.parametrize(("queries", "keys", "size"), [(4, 2, 2), (24, 4, 3), (24, 4, 8), (6, 1, 4), (4, 1, 4)])
def test_every_query_head_finds_its_key_head(queries: int, keys: int, size: int) -> None:
    seen: list[int] = []
    for part in machines(size):
        own = part.heads(queries, keys, 16, nn.Linear(queries * 16, 8, bias=False))
        assert own is not None
        shared = queries // keys
        here = len(own.queries) // len(own.keys)  # as attention counts them: query i reads key i // here
        assert [own.keys[i // here] for i in range(len(own.queries))] == [head // shared for head in own.queries]
        seen += own.queries
    assert seen == list(range(queries))


def test_heads_that_cannot_be_shared_out_stay_whole() -> None:
    out = nn.Linear(64, 8, bias=False)
    assert all(part.heads(4, 2, 16, out) is None for part in machines(3))  # 3 machines, 2 KV heads
    assert all(part.heads(4, 2, 16, out) is None for part in machines(8))  # more machines than heads
    packed = nn.QuantizedLinear(64, 8, bias=False, group_size=64)
    assert all(part.heads(4, 4, 16, packed) is None for part in machines(2))  # 4 heads share a scale
    packed = nn.QuantizedLinear(64, 8, bias=False, group_size=32)
    assert machines(2)[1].heads(4, 4, 16, packed) == Heads(range(2, 4), range(2, 4))


def test_channels_are_cut_evenly_where_they_can_be() -> None:
    assert [len(p.inner(nn.Linear(1056, 8, bias=False)) or ()) for p in machines(2)] == [528, 528]
    packed = nn.QuantizedLinear(704, 64, bias=False, group_size=64)
    assert [len(p.inner(packed) or ()) for p in machines(2)] == [320, 384]  # eleven groups


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("experts", [0, 3], ids=["one MLP", "experts"])
def test_a_gated_mlp_is_the_sum_of_its_parts(form: tuple[int, int, str] | None, size: int, experts: int) -> None:
    x = mx.random.normal((1, 5, 64))
    chosen = [mx.array([[[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]])] if experts else []
    wanted = gated(64, 192, form, experts)(x, *chosen)
    total = mx.zeros_like(wanted)
    for part in machines(size):
        mlp = gated(64, 192, form, experts)
        before = weight_bytes(mlp)
        parts.keep_inner(part, mlp)
        assert weight_bytes(mlp) < 0.7 * before
        total = total + mlp(x, *chosen)
    assert gap(total, wanted) < 1e-5


def test_mlps_that_are_added_up_stay_whole_together() -> None:
    coarse, fine = gated(64, 128, (64, 4, "affine")), gated(64, 128, (32, 4, "affine"))
    before = fine.down_proj.weight.shape
    assert parts.keep_inner(Part(0, 4, mx.abs), fine, coarse) is parts.alone
    assert fine.down_proj.weight.shape == before
    assert parts.keep_inner(Part(0, 4, mx.abs), fine) is mx.abs


def test_what_is_no_plain_product_is_refused() -> None:
    class Strange(nn.Linear):
        pass

    parts.keep_rows(Strange(8, 8, bias=False), range(4))
    for module in (nn.Linear(8, 8), nn.Embedding(8, 8), SwitchLinear(8, 8, 2, bias=True)):
        with pytest.raises(ValueError, match=f"a {type(module).__name__} with.* a bias cannot be cut"):
            parts.keep_columns(module, range(4))


def test_a_part_does_not_keep_the_whole_in_memory() -> None:
    whole = mx.zeros((1024, 1024))
    mx.eval(whole)
    before = mx.get_active_memory()
    first = parts.cut(whole, 0, range(0, 256))
    mx.eval(first)
    del whole
    assert mx.get_active_memory() < before - 2 * 2**20
    assert first.nbytes == 2**20


def last_layers() -> list[qwen3_5.DecoderLayer]:
    """One of each kind: 2 key heads, or 4 heads that share 2 KV heads."""
    pair, _ = load(FIXTURES / "qwen3_5_dense", dtype=mx.float32)
    assert isinstance(pair.target, qwen3_5.Model)
    return pair.target.layers[-2:]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", [None, (32, 4, "affine"), (32, 4, "mxfp4")], ids=str)
def test_attention_and_recurrence_are_the_sums_of_their_heads(size: int, form: tuple[int, int, str] | None) -> None:
    x, span = mx.random.normal((1, 6, 64)), Span(0, 6)

    def read(part: Part | None) -> dict[str, mx.array]:
        by_kind: dict[str, mx.array] = {}
        for layer in last_layers():
            if form is not None:
                nn.quantize(layer, *form[:2], mode=form[2])
            if part is not None:
                layer.share(part)
            if "self_attn" in layer:
                visible = layer.self_attn.keys_and_values(x, span)
                by_kind["attention"] = layer.self_attn(x, visible, "causal", span)
            else:
                by_kind["recurrence"] = layer.linear_attn(x, RecurrentCache(4))
            by_kind["mlp"] = layer.mlp(x)
        return by_kind

    wanted, found = read(None), [read(part) for part in machines(size)]
    shared = {"attention", "mlp", "recurrence"} if size == 2 else {"attention", "mlp"}
    if form is not None and size == 4:
        shared = {"attention"}  # 96 channels are three groups
    for kind in shared:
        assert gap(sum((each[kind] for each in found), mx.zeros_like(wanted[kind])), wanted[kind]) < 2e-5
    for kind in wanted.keys() - shared:  # too few for all machines: each computes the whole
        assert all(gap(each[kind], wanted[kind]) == 0 for each in found)


def test_keys_that_others_read_stay_whole() -> None:
    pair, _ = load(FIXTURES / "gemma4_ple", drafter=FIXTURES / "gemma4_ple" / "assistant", dtype=mx.float32)
    model = pair.pair.target
    assert isinstance(model, gemma4.Model)
    owners = {model.config.owner(kind) for kind in set(model.config.layer_types)}
    before = [layer.self_attn.q_proj.weight.shape for layer in model.layers]
    for layer in model.layers:
        layer.share(Part(1, 2))
    for i, layer in enumerate(model.layers):
        whole = i in owners or i >= model.config.first_shared
        assert (layer.self_attn.q_proj.weight.shape == before[i]) is whole
        assert layer.mlp.gate_proj.weight.shape[0] == (24 if i < model.config.first_shared else 48)
