"""The built-in pair: real text, real acceptance, and the same tokens with and without drafts."""

import json
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import float32_copy, mlx_lm_model
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mtp_mlx
from mtp_mlx.generation import encode
from mtp_mlx.hub import DEMOS

HELD_OUT = Path(__file__).parent.parent / "bench" / "demo" / "heldout.json"
PROMPTS = 11
TOKENS = 72
# Of these prompts: one whose text stays below the window of 128, two across it, two above. Qwen has no window.
TEXTS = {"demo": (0, 3, 6, 9, 10), "demo-qwen": (6, 9)}


def _prompts() -> list[str]:
    """Evenly spread over the file, which goes from short prompts to ones far above the window."""
    texts = [entry["text"] for entry in json.loads(HELD_OUT.read_text())]
    return [texts[i * len(texts) // PROMPTS] for i in range(PROMPTS)]


# Rows of a block equal single rows to the bit on MLX's own CPU kernels. Elsewhere (Accelerate on a Mac) bfloat16
# logits are often tied, and the tie may fall differently; float32 ones hardly ever are.
DTYPE = None if sys.platform == "linux" else mx.float32


@cache
def _demo(name: str) -> tuple[mtp_mlx.Pair, TokenizerWrapper]:
    model, tokenizer = mtp_mlx.load(name, dtype=DTYPE)
    return model.pair, tokenizer


def test_the_prompts_lie_below_across_and_far_above_the_window() -> None:
    loaded, tokenizer = mtp_mlx.load("demo")
    pair = loaded.pair
    window = pair.target.config.sliding_window  # type: ignore[attr-defined]
    lengths = [len(tokenizer.encode(_prompts()[number])) for number in TEXTS["demo"]]
    assert sum(length + TOKENS > window > length for length in lengths) == 2
    assert max(lengths) > 2 * window
    assert min(lengths) + TOKENS < window


@cache
def _text(name: str, number: int, depth: int) -> list[mtp_mlx.Response]:
    pair, tokenizer = _demo(name)
    return list(mtp_mlx.stream_generate(pair, tokenizer, _prompts()[number], max_tokens=TOKENS, depth=depth))


@pytest.mark.parametrize(
    ("name", "number"),
    [pytest.param(name, n, marks=pytest.mark.xdist_group(name)) for name, numbers in TEXTS.items() for n in numbers],
)
def test_greedy_text_is_the_same_with_and_without_drafts(name: str, number: int) -> None:
    plain, drafted = ([response.token for response in _text(name, number, depth)] for depth in (0, 4))
    assert drafted == plain
    assert len(plain) > 10


@pytest.mark.parametrize("name", DEMOS)
def test_plain_decoding_equals_mlx_lm_in_float32(name: str, tmp_path: Path) -> None:
    folder = float32_copy(DEMOS[name], tmp_path / "wide")
    loaded, tokenizer = mtp_mlx.load(folder)
    pair = loaded.pair
    theirs = mlx_lm_model(folder)
    # mlx-lm has a slow loop over a prompt's tokens on the CPU where a layer is recurrent.
    ids = encode(tokenizer, _prompts()[5])[:100]  # the window of 128 is passed
    ours = [r.token for r in mtp_mlx.stream_generate(pair, tokenizer, ids, max_tokens=40, depth=0)]
    steps = generate_step(mx.array(ids), theirs, max_tokens=40)
    assert ours == [int(token) for token, _ in steps]
    assert len(ours) == 40


# In the process that has written the texts.
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TEXTS])
def test_the_drafter_is_worth_having(name: str) -> None:
    generated = rounds = 0
    for number in TEXTS[name]:
        last = _text(name, number, 4)[-1]
        generated, rounds = generated + last.stats.generation_tokens, rounds + last.stats.rounds
    least = {"demo": 2.3, "demo-qwen": 2.7}  # of Qwen 3.2; 2.4 from a wrong hidden
    assert generated / rounds > least[name], "the figure over all prompts is in the model card; this sample is small"


@pytest.mark.parametrize("name", DEMOS)
def test_the_pair_is_small_and_has_a_card(name: str) -> None:
    size = sum(path.stat().st_size for path in DEMOS[name].rglob("*") if path.is_file())
    assert size < 20e6
    card = (DEMOS[name] / "README.md").read_text()
    for word in ("licence", "tokens per round", "nats per token", "sympy"):
        assert word.lower() in card.lower()
