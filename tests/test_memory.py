"""Bytes told from shapes are those of the buffers themselves, and of the arithmetic written out by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import QWEN, VARIANTS, tiny, tiny_qwen, varied_tokens
from mlx_lm.convert import convert

from mtp_mlx import memory
from mtp_mlx.cache import MAX_BLOCK
from mtp_mlx.choosing import Rules
from mtp_mlx.loading import load
from mtp_mlx.memory import Recurrence, Rows, Traffic, Weights, kv_bytes, kv_read
from mtp_mlx.sampling import Greedy
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Pair


@pytest.mark.parametrize("variant", [*VARIANTS, *QWEN])
@pytest.mark.parametrize(("tokens", "drafts", "bits"), [(20, 0, None), (20, 3, None), (300, 2, 8), (20, 0, 4)])
def test_a_cache_holds_what_was_told_to_the_byte(variant: str, tokens: int, drafts: int, bits: int | None) -> None:
    target, drafter = tiny_qwen(variant) if variant in QWEN else tiny(variant)
    sequence = Sequence(Pair(target, drafter, kv_bits=bits), Rules(Greedy(), drafts="argmax"))
    sequence.prefill(varied_tokens(tokens), 128, lambda done, total: None)
    sequence.round(drafts if sequence.ready else 0)
    k = drafts if variant in QWEN else 0  # an assistant drafts from the second round on
    length = tokens - 1 + k + 1
    beside = drafter.network.layout if variant in QWEN else ()
    told = kv_bytes(target.layout, length, bits, 4, block=k + 1) + kv_bytes(beside, length, None, 4)
    assert sequence.cache.nbytes == told + 4  # the position


def test_an_assistant_holds_nothing_and_reads_the_targets_rows() -> None:
    target, assistant = tiny("gemma4_ple")
    assert kv_bytes(assistant.network.layout, 1000) == 0
    sequence = Sequence(Pair(target, assistant), Rules(Greedy(), drafts="argmax"))
    sequence.prefill(varied_tokens(300), 128, lambda done, total: None)
    sequence.round(0)
    once = sum(entry.nbytes(300, None, 4) for entry in assistant.network.layout if isinstance(entry, Rows))
    assert once == assistant.reads(sequence.cache)
    # Three layers look at the window of 16 + 32 slots, one at 512 slots of every token; one head of 16 and 32 numbers.
    assert kv_read(assistant.network.layout, 300, None, 4) == 3 * 2 * 48 * 16 * 4 + 2 * 512 * 32 * 4


def test_layers_that_share_keys_read_them_too() -> None:
    """Ten layers, 4 sliding and 1 full twice; the second five have no keys of their own."""
    target, _ = tiny("gemma4_ple")
    layout = target.layout
    assert [entry.readers for entry in layout if isinstance(entry, Rows)] == [1, 1, 1, 5, 2]
    window, full = 2 * 48 * 16 * 4, 2 * 256 * 32 * 4  # keys and values, slots, size, float32
    assert kv_bytes(layout, 100, None, 4) == 4 * window + full
    assert kv_read(layout, 100, None, 4) == 8 * window + 2 * full


BITS: dict[int, Callable[[int], int]] = {8: lambda size: size, 4: lambda size: size // 2}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("size", "group"), [(128, 64), (512, 64), (96, 32)])
def test_quantised_rows_have_a_scale_and_a_bias_for_each_group(bits: int, size: int, group: int) -> None:
    rows = Rows(heads=3, size=size)
    expected = BITS[bits](size) + 2 * (size // group) * 2
    assert rows.nbytes(1000, bits, 2) == 2 * 3 * 1024 * expected
    parts = mx.quantize(mx.zeros((1, size), mx.bfloat16), group_size=group, bits=bits)
    assert sum(part.nbytes for part in parts) == expected, "as MLX packs them"


def test_only_rows_of_every_token_are_quantised() -> None:
    window = Rows(heads=2, size=64, window=100)
    assert window.nbytes(5000, 4, 2) == 2 * 2 * (100 + MAX_BLOCK) * 64 * 2
    state = Recurrence(state=100, tail=10, row=5, exact_row=1)
    assert kv_bytes((state,), 5000, 4, 2, block=0) == 4 * 100 + 2 * 10
    assert kv_bytes((state,), 5000, 4, 2, block=3) == 2 * (4 * 100 + 2 * 10) + 3 * (2 * 5 + 4)
    with pytest.raises(ValueError, match="head of 80"):
        Rows(heads=1, size=80).nbytes(10, 8, 2)


def weights_of(target: Any) -> Weights:
    return memory.weights(target, target.traffic)


@pytest.mark.parametrize("variant", [*VARIANTS, *QWEN])
def test_weights_are_those_that_were_loaded(variant: str) -> None:
    target, drafter = tiny_qwen(variant) if variant in QWEN else tiny(variant)
    assert weights_of(target).nbytes == target.nbytes
    assert weights_of(drafter.network).nbytes == drafter.nbytes
    assert weights_of(target).read <= target.nbytes


def test_look_ups_and_idle_experts_are_not_read() -> None:
    """Vocabulary 320, width 64, float32."""
    tied, _ = tiny("gemma4_keqv")
    assert weights_of(tied).read == tied.nbytes and weights_of(tied).output == 320 * 64 * 4
    ple, _ = tiny("gemma4_ple")
    assert weights_of(ple).read == ple.nbytes - 320 * 10 * 8 * 4, "per-layer embeddings: 10 layers of 8"
    moe, _ = tiny("gemma4_moe")
    experts = 6 * 3 * 8 * 32 * 64 * 4  # layers, matrices, experts, inner width, width
    assert weights_of(moe).read == moe.nbytes - experts * 6 // 8 and weights_of(moe).routed == experts * 2 // 8
    assert (weights_of(moe).experts, weights_of(moe).chosen) == (8, 2)
    untied, _ = tiny_qwen("qwen3_5_dense")
    table = 320 * 64 * 4
    assert weights_of(untied).read == untied.nbytes - table and weights_of(untied).output == table
    _, ordered = tiny("gemma4_keqv", "assistant_ordered")  # 4 of 16 groups of tokens are scored
    found = weights_of(ordered.network)
    assert found.nbytes - found.read == 320 * 32 * 4 * 12 // 16


def test_quantised_weights_count_by_what_they_stand_for(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    source = str(Path(__file__).parent / "fixtures" / "gemma4_moe")
    convert(source, str(folder), quantize=True, q_bits=4, q_group_size=32, dtype="float32")
    pair = load(folder, drafter=None)[0].pair
    found, plain = weights_of(pair.target), weights_of(tiny("gemma4_moe")[0])
    assert found.nbytes == pair.target.nbytes < plain.nbytes / 3
    assert (found.parameters, found.active) == (plain.parameters, plain.active)


def test_a_block_of_a_mixture_reads_the_union_of_its_experts() -> None:
    moe = Weights(nbytes=0, read=300, output=0, routed=200, parameters=0, active=0, experts=128, chosen=8)
    assert moe.block(1, 0.0) == 300
    # 128 (1 - (15/16)^2) = 15.5 experts for two rows that choose independently
    assert moe.block(2, 0.0) == pytest.approx(100 + 200 * 15.5 / 8)
    assert moe.block(2, 0.9) == 300, "never less than one row's"
    dense = Weights(nbytes=0, read=300, output=0, routed=0, parameters=0, active=0, experts=0, chosen=0)
    assert dense.block(8, 0.0) == 300


def test_a_network_without_an_output_head_borrows_the_targets() -> None:
    _, head = tiny_qwen("qwen3_5_dense")
    assert head.network.traffic == Traffic() and weights_of(head.network).read == head.nbytes


def test_the_machine_has_memory() -> None:
    assert 1e9 < memory.machine_bytes() < 1e13
