"""A drafter in fewer bits drafts a little differently and changes nothing; who needs it is told from sizes."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from conftest import FIXTURES, DialledDrafter, Forced, gap, run_rounds, varied_tokens
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from test_rounds import EXACT

from mtp_mlx.drafter_bits import choose_bits, is_quantised, quantise
from mtp_mlx.errors import RequestError
from mtp_mlx.loading import load, load_pair
from mtp_mlx.models.gemma4_assistant import Assistant
from mtp_mlx.models.qwen3_5_mtp import Head
from mtp_mlx.sampling import Greedy

PAIRS = ["gemma4_ple", "gemma4_moe", "qwen3_5_tied", "qwen3_5_moe"]


@pytest.mark.parametrize("variant", PAIRS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_drafter_changes_nothing_and_takes_less(variant: str, bits: int) -> None:
    whole = load(FIXTURES / variant, dtype=mx.float32)[0].pair
    pair = load(FIXTURES / variant, dtype=mx.float32, drafter_bits=bits)[0].pair
    assert pair.drafter.nbytes < whole.drafter.nbytes * (0.3 if bits == 4 else 0.45)
    text = varied_tokens(60)
    forced, nobody = Forced(mx.array(text + [0] * 8)), DialledDrafter.dial([], 0.0)
    _, rows, _ = run_rounds(pair.target, nobody, forced, text[:20], 36, 0)
    for k in (1, 4):
        assert gap(run_rounds(pair.target, pair.drafter, forced, text[:20], 36, k)[1], rows) < EXACT


@pytest.mark.parametrize("name", ["demo", "demo-qwen"])
def test_eight_bits_draft_nearly_as_well(name: str) -> None:
    prompt = "import os\nimport sys\n\n\ndef main("
    accepted = []
    for bits in (None, 8):
        loaded, tokenizer = load(name, dtype=mx.float32, drafter_bits=bits)
        pair = loaded.pair
        forced_text = tokenizer.encode(prompt)
        accepted.append(sum(run_rounds(pair.target, pair.drafter, Greedy(), forced_text, 60, 3)[2]))
    assert abs(accepted[1] - accepted[0]) <= 0.15 * accepted[0] and accepted[0] > 20


def test_auto_narrows_a_large_drafter_beside_a_quantised_target_only(tmp_path: Path) -> None:
    source = FIXTURES / "gemma4_keqv"
    assert "bits" not in load_pair(str(source)).drafter_reason
    mlx_lm.convert(str(source), str(tmp_path / "target"), quantize=True, q_bits=8, q_group_size=32)
    named = str(source / "assistant")
    loaded = load_pair(str(tmp_path / "target"), named)
    assert isinstance(loaded.pair.drafter, Assistant) and is_quantised(loaded.pair.drafter.network)
    assert "held in 4 bits, since it would read" in loaded.drafter_reason
    kept = load_pair(str(tmp_path / "target"), named, drafter_bits=None)
    assert isinstance(kept.pair.drafter, Assistant) and not is_quantised(kept.pair.drafter.network)


def test_bits_that_are_not_to_be_had_are_refused() -> None:
    folder = FIXTURES / "gemma4_keqv"
    with pytest.raises(RequestError, match="cannot be held in 2 bits; give 4 or 8"):
        load(folder, drafter_bits=2)
    with pytest.raises(RequestError, match="no drafter to hold in 4 bits"):
        load(folder, drafter=None, drafter_bits=4)
    with pytest.raises(RequestError, match="cannot be held in 3 bits; give 4 or 8, or leave it out"):
        load(folder, kv_bits=3)
    pair = load(folder, drafter_bits=8)[0].pair
    assert isinstance(pair.drafter, Assistant)
    with pytest.raises(RequestError, match="quantised already"):
        choose_bits(4, pair.drafter.target, pair.drafter.network)


def test_choosers_of_experts_and_odd_widths_stay_as_they_are() -> None:
    pair = load(FIXTURES / "qwen3_5_moe", dtype=mx.float32)[0].pair
    assert isinstance(pair.drafter, Head)
    quantise(pair.drafter.network, 4)
    modules = dict[str, nn.Module](pair.drafter.network.named_modules())  # type: ignore[no-untyped-call]
    packed = {name for name, module in modules.items() if _packed(module)}
    assert "fc" in packed and not any(name.endswith(("mlp.gate", "shared_expert_gate")) for name in packed)
    odd = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 3))
    quantise(odd, 4)
    assert [_packed(layer) for layer in odd.layers] == [False, True]


def _packed(module: nn.Module) -> bool:
    return isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear)
