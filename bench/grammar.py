"""What a grammar costs a round, and what its masks cost with a large vocabulary.

    python bench/grammar.py [--model demo] [--depth 4] [--rounds 60] [--repeats 7] [--vocabulary 150000] [--out f.json]

`rounds`: one text is written twice in turns, a round with a grammar that allows what the model writes anyway, then one
without; milliseconds are medians of repeats' medians, `ratio` is of these. `masks` are those of a block of depth + 1
rows along JSON by a schema, with the model's own vocabulary and with a byte-level one of made-up words; microseconds,
of which the device hides those that it takes longer itself. `forced` counts at how many places of that text only one
token may follow.
"""

import json
import random
import statistics
import time
from typing import Any

import report
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import mtp_mlx
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.dialects import PLAIN
from mtp_mlx.generation import DEFAULT_PREFILL_STEP, encode
from mtp_mlx.grammar import Grammar, Guide
from mtp_mlx.sequence import Sequence

TEXT = "def split(words):\n    found = []\n    for word in words:\n"
ADDRESS = {
    "type": "object",
    "properties": {"street_and_number": {"type": "string"}, "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["street_and_number", "postal_code"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 60},
        "shipping_address": ADDRESS,
        "billing_address": ADDRESS,
        "order_lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"article_number": {"type": "integer"}, "unit_price": {"type": "number"}},
                "required": ["article_number", "unit_price"],
            },
        },
        "status": {"enum": ["open", "paid", "cancelled"]},
    },
    "required": ["customer_name", "shipping_address", "order_lines", "status"],
}
PLACE = {"street_and_number": "12 Mill Lane", "postal_code": "04103"}
LINES = [{"article_number": 4711, "unit_price": 12.5}, {"article_number": 815, "unit_price": 3}]
VALUE = {"customer_name": "Ada Lovelace", "shipping_address": PLACE, "order_lines": LINES, "status": "paid"}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    options = parser.parse_args()
    loaded, tokenizer = mtp_mlx.load(options.model, drafter=options.drafter, dtype=DTYPES[options.dtype])
    pair = loaded.pair
    rounds = beside(pair, tokenizer, options.depth, options.rounds, options.repeats)
    report.say(f"rounds: {rounds}")
    own = Guide.of(tokenizer, pair.target.vocabulary, frozenset(tokenizer.eos_token_ids), PLAIN)
    small = masks(own, options.depth)
    large = masks(made_up(options.vocabulary), options.depth)
    settings = {name: vars(options)[name] for name in ("model", "dtype", "depth", "rounds", "repeats", "vocabulary")}
    report.write({"settings": settings, "rounds": rounds, "masks": {"own": small, "large": large}}, options.out)


def beside(pair: mtp_mlx.Pair, tokenizer: TokenizerWrapper, k: int, count: int, repeats: int) -> dict[str, Any]:
    """Rounds with a grammar beside the same rounds without."""
    guide = Guide.of(tokenizer, pair.target.vocabulary, frozenset(tokenizer.eos_token_ids), PLAIN)
    permissive = Grammar.regex(guide, r"(?s:.)*")
    medians: dict[str, list[float]] = {"with": [], "without": []}
    same = True
    for repeat in range(repeats + 1):  # the first one builds kernels
        texts = {name: opened(pair, tokenizer) for name in medians}
        texts["with"].grammar = permissive.start()
        times: dict[str, list[float]] = {name: [] for name in medians}
        for i in range(count):
            for name in sorted(medians, reverse=bool(i % 2)):
                times[name].append(texts[name].round(k if texts[name].ready else 0).times.total)
        same = same and texts["with"].text == texts["without"].text
        for name in medians if repeat else ():
            medians[name].append(statistics.median(times[name]))
    figures = {f"{name}_ms": round(1e3 * statistics.median(found), 3) for name, found in medians.items()}
    ratios = sorted(a / b for a, b in zip(medians["with"], medians["without"], strict=True))
    ratio = round(statistics.median(ratios), 4)
    return {**figures, "ratio": ratio, "ratios": [round(r, 4) for r in ratios], "same_text": same}


def opened(pair: mtp_mlx.Pair, tokenizer: TokenizerWrapper) -> Sequence:
    sequence = Sequence(pair, mtp_mlx.Rules())
    sequence.prefill(encode(tokenizer, TEXT), DEFAULT_PREFILL_STEP, lambda done, total: None)
    return sequence


def masks(guide: Guide, k: int) -> dict[str, Any]:
    """What the host does in a round, along a text that the schema allows."""
    began = time.perf_counter()
    Grammar.json_object(guide)
    built = time.perf_counter()
    grammar = Grammar.json_schema(guide, SCHEMA)
    compiled = time.perf_counter()
    tokens = guide.backend.encode(json.dumps(VALUE, indent=2), add_special_tokens=False).ids
    cold, warm = along(grammar, tokens, k), along(grammar, tokens, k)
    return {
        "vocabulary": guide.vocabulary,
        "tokens": len(tokens),
        "forced": forced(grammar, tokens),
        "tokenizer_ms": round(1e3 * (built - began), 1),
        "schema_ms": round(1e3 * (compiled - built), 1),
        "first_text": _figures(cold),
        "second_text": _figures(warm),
    }


def along(grammar: Grammar, tokens: list[int], k: int) -> list[float]:
    """Seconds of each block's masks, all drafts being right, and of advancing by them."""
    state, times = grammar.start(), []
    for place in range(0, len(tokens), k + 1):
        began = time.perf_counter()
        state.masks(tokens[place : place + k])
        state.advance(tokens[place : place + k + 1])
        times.append(time.perf_counter() - began)
    return times


def forced(grammar: Grammar, tokens: list[int]) -> int:
    """Places of a text at which only one token may follow."""
    state, found = grammar.start(), 0
    for token in tokens:
        rows = state.masks([])
        found += rows is not None and sum(int(word).bit_count() for word in rows.flatten().tolist()) == 1
        state.advance([token])
    return found


def made_up(size: int) -> Guide:
    """A byte-level vocabulary of so many tokens: words as long as those of a large one, grown by merges."""
    rng = random.Random(0)
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    letters = ["Ġ", *"eeeettaaoinshrdlucmfwypvbgkqjxz", *'ABCDEFGHIJ0123456789_-:,.{}"']
    words, merges = [*letters], []
    while len(vocabulary) < size:
        left, right = rng.choice(words), rng.choice(letters)
        if left + right not in vocabulary and len(left) < 12:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
            words.append(left + right)
    made = Tokenizer(BPE(vocabulary, merges))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return Guide(made, size + 300, frozenset([size]), PLAIN)


def _figures(times: list[float]) -> dict[str, float]:
    micro = sorted(1e6 * seconds for seconds in times)
    figures = {"median_us": statistics.median(micro), "p90_us": micro[int(0.9 * len(micro))], "most_us": micro[-1]}
    return {name: round(value, 1) for name, value in figures.items()}


if __name__ == "__main__":
    main()
