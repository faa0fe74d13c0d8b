"""Under a grammar drafting changes nothing either, and whatever is written is what the grammar allows."""

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, PROGRAMS, VOCAB, DialledDrafter, Forced, gap, run_rounds, tiny_pair, varied_tokens
from llguidance import LLParserLimits
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from test_rounds import EXACT

from mtp_mlx import grammar as module
from mtp_mlx.accept import normalise
from mtp_mlx.batch import Round
from mtp_mlx.choosing import Callables, Rules, masked
from mtp_mlx.dialects import PLAIN, Dialect
from mtp_mlx.errors import RequestError
from mtp_mlx.grammar import Grammar, GrammarState, Guide
from mtp_mlx.marks import Mark, Marker
from mtp_mlx.ngram import NoDrafter
from mtp_mlx.penalties import Penalties
from mtp_mlx.sampling import Greedy, Sample
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Drafter, Pair

FAMILIES = ["gemma4_keqv", "qwen3_5_tied"]
EOS, TURN, OPEN, CLOSE, CALL = 1, 319, 318, 2, 3  # of the tiny tokenizer, which has no markers of reasoning of its own
STOPS = frozenset([EOS, TURN])
MARKERS = ((Mark.THINK_OPEN, "<|turn>", OPEN), (Mark.THINK_CLOSE, "<bos>", CLOSE), (Mark.CALL_OPEN, "<unk>", CALL))
THINKS = Dialect("thinks", markers=tuple(Marker(*marker) for marker in MARKERS))
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["gre", "ifi"]}, "maxItems": 3},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}


@cache
def tiny_tokenizer() -> TokenizerWrapper:
    return load(FIXTURES / "gemma4_keqv")


@cache
def tiny_guide(dialect: Dialect = THINKS, vocabulary: int = VOCAB) -> Guide:
    return Guide.of(tiny_tokenizer(), vocabulary, STOPS, dialect)


def person() -> Grammar:
    return Grammar.json_schema(tiny_guide(), PERSON)


def is_person(text: str) -> bool:
    value = json.loads(text)
    assert isinstance(value, dict) and set(value) <= set(PERSON["properties"])  # type: ignore[call-overload]
    tags = value.get("tags", [])
    return len(value["name"]) <= 6 and 0 <= value["n"] <= 99 and len(tags) <= 3 and set(tags) <= {"gre", "ifi"}


def ids(text: str) -> list[int]:
    return [int(token) for token in tiny_tokenizer().encode(text, add_special_tokens=False)]


def rows_of(masks: mx.array) -> list[list[int]]:
    """The tokens that each row allows."""
    bits = np.unpackbits(np.array(masks)[0].view(np.uint8), axis=-1, bitorder="little")
    return [[int(token) for token in np.flatnonzero(row)] for row in bits]


def allowed(state: GrammarState) -> list[int]:
    masks = state.masks([])
    assert masks is not None
    return rows_of(masks)[0]


def opened(
    variant: str, drafter: Drafter, chooser: Rules | Callables, state: GrammarState | None, seed: int
) -> Sequence:
    sequence = Sequence(Pair(tiny_pair(variant)[0], drafter, PROGRAMS), chooser, seed)
    sequence.grammar = state
    sequence.prefill(PROMPT, 2048, lambda done, total: None)
    return sequence


PROMPT = varied_tokens(10)
LENGTH = 32
_BLANK = [token for token in range(VOCAB) if tiny_tokenizer().decode([token]).isspace()]
# A random model would write white space for long.
HARD = Penalties(repetition=1.3, presence=0.5, bias=tuple((token, -9.0) for token in _BLANK))


def write(
    variant: str, drafter: Drafter, chooser: Rules | Callables, state: GrammarState, k: int, seed: int
) -> list[int]:
    """Tokens up to the first stop, or so many."""
    sequence = opened(variant, drafter, chooser, state, seed)
    text: list[int] = []
    while len(text) < LENGTH and not STOPS & set(text):
        text += sequence.round(k if sequence.ready else 0).tokens
    return text[: next((i + 1 for i, token in enumerate(text) if token in STOPS), LENGTH)]


@cache
def plainly(variant: str, sampler: Greedy | Sample, penalties: Penalties, seed: int) -> list[int]:
    return write(variant, NoDrafter(), Rules(sampler, penalties), person().start(may_think=False), 0, seed)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize(("sampler", "penalties"), [(Greedy(), Penalties()), (Sample(1.1), HARD)])
def test_speculation_under_a_grammar_writes_plain_decodings_text(
    variant: str, sampler: Greedy | Sample, penalties: Penalties
) -> None:
    truth = plainly(variant, sampler, penalties, 3)
    partial: set[tuple[int, int]] = set()
    for k in (1, 2, 3, 4):
        dialled = DialledDrafter.dial(PROMPT + truth, 0.7, seed=k)
        sequence = opened(variant, dialled, Rules(sampler, penalties, "argmax"), person().start(may_think=False), 3)
        text: list[int] = []
        while len(text) < len(truth):
            result = sequence.round(k)
            text += result.tokens
            partial.add((k, result.accepted))
        assert text[: len(truth)] == truth, k
    assert {(4, 0), (4, 4), (2, 1), (3, 3)} <= partial
    own = tiny_pair(variant)[1]
    assert write(variant, own, Rules(sampler, penalties), person().start(may_think=False), 3, 3) == truth


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("drafts", ["coupled", Sample(0.8)])
def test_a_seeds_text_ends_as_what_the_schema_says(variant: str, drafts: Any) -> None:
    own, ended = tiny_pair(variant)[1], 0
    for seed in range(2):
        rules = Rules(Sample(1.0, top_p=0.9), HARD, drafts)
        text = write(variant, own, rules, person().start(may_think=False), 3, seed)
        if text[-1] in STOPS:
            ended += 1
            assert is_person(tiny_tokenizer().decode(text[:-1]))
    assert ended


def test_random_texts_within_the_masks_are_what_the_schema_says() -> None:
    """Every token of a mask may follow, however unlikely."""
    rng, texts = random.Random(0), set()
    for _ in range(60):
        state, text = person().start(may_think=False), list[int]()
        while not STOPS & set(text):
            found = allowed(state)
            assert max(found) < VOCAB and bool(STOPS & set(found)) == state.complete
            blank = [token for token in found if not tiny_tokenizer().decode([token]).isspace()]
            text.append(rng.choice(blank or found))
            state.advance(text[-1:])
        assert is_person(tiny_tokenizer().decode(text[:-1]))
        texts.add(tuple(text))
    assert len(texts) > 50


def test_white_space_is_bounded() -> None:
    state = Grammar.json_object(tiny_guide()).start(may_think=False)
    state.advance(ids("{"))
    written = 0
    while any(found := [token for token in allowed(state) if tiny_tokenizer().decode([token]).isspace()]):
        state.advance(found[-1:])
        written += 1
        assert written < 40


def _starts(rng: random.Random) -> GrammarState:
    frees = frozenset([CALL]) if rng.random() < 0.5 else frozenset[int]()
    grammars = (
        person(),
        Grammar.regex(tiny_guide(), "(a|the)+b"),
        Grammar.choice(tiny_guide(), ["it", "iff\n", "\nx"]),
    )
    return rng.choice(grammars).start(thinking=rng.random() < 0.4, may_think=rng.random() < 0.7, frees=frees)


def test_masks_of_a_block_are_those_of_one_token_after_the_other() -> None:
    """Through every phase, wherever a forbidden draft stands; and asking changes nothing."""
    rng, special = random.Random(1), [OPEN, CLOSE, CALL, EOS, TURN, *ids("\n")]
    seen = set()
    for _ in range(60):
        state = _starts(rng)
        for _ in range(6):
            drafts: list[int] = []
            expected: list[list[int] | None] = []
            walker = state
            for _ in range(rng.randint(0, 4) + 1):
                masks = walker.masks(drafts)
                row = None if masks is None else rows_of(masks)[len(drafts)]
                likely = [token for token in special if row is None or token in row]
                drafts.append(rng.choice(likely if likely and rng.random() < 0.5 else row or range(VOCAB)))
                expected.append(row)
            wrong = rng.random() < 0.3 and expected[-1] is not None
            if wrong:
                drafts[-1] = next((t for t in range(VOCAB) if t not in (expected[-1] or [])), drafts[-1])
            block = state.masks(drafts)
            for j in range(len(drafts)):
                alone = state.masks([])
                found = list(range(320)) if alone is None else rows_of(alone)[0]
                assert (list(range(320)) if block is None else rows_of(block)[j]) == found, (drafts, j)
                if drafts[j] not in found:
                    assert block is not None and len(rows_of(block)[j + 1]) == 320
                    break
                seen.add(state._phase)
                state.advance([drafts[j]])
    assert len(seen) == 6


@pytest.mark.parametrize("variant", FAMILIES)
def test_reasoning_may_end_anywhere_within_a_block(variant: str) -> None:
    """Rows up to the end of reasoning are plain decoding's, those behind it are masked, whatever was drafted."""
    text = [*PROMPT, *varied_tokens(9, seed=4), CLOSE, *ids("\n"), *ids('{"name":"abcdef"')]
    forced, count = Forced(mx.array(text + [0] * 20)), 16
    expected = run_rounds(tiny_pair(variant)[0], NoDrafter(), forced, PROMPT, count, 0)[1]
    for first in range(4):  # so that the marker stands at every place of a block
        sequence = opened(variant, NoDrafter(), Rules(forced), person().start(thinking=True), 0)
        results: list[Round] = [sequence.round(0) for _ in range(first)]
        while len(sequence.text) < len(PROMPT) + count:
            here = len(sequence.text)
            results.append(sequence.round(text[here : here + 4]))
            assert results[-1].accepted == 4
        rows = mx.concatenate([result.logprobs[: len(result.tokens)] for result in results])[:count]
        shown = mx.isfinite(rows)
        assert [bool(row.all()) for row in np.array(shown)] == [True] * 10 + [False] * 6
        left = mx.where(shown, expected, -mx.inf)
        assert gap(mx.where(shown, rows - normalise(left), 0), mx.zeros(rows.shape)) < EXACT


def test_what_an_answer_may_begin_with() -> None:
    brace = ids("{")
    grammar = person()
    assert set(allowed(grammar.start(may_think=False))) == set(brace)
    assert set(allowed(grammar.start())) == {*brace, OPEN}
    assert set(allowed(grammar.start(frees=frozenset([CALL])))) == {*brace, OPEN, CALL}
    state = grammar.start(thinking=True, frees=frozenset([CALL]))
    assert state.masks([7, CLOSE, *ids("\n")]) is not None and state.masks([7, 8, OPEN, CALL]) is None
    masks = state.masks([CALL, OPEN, CLOSE])  # within reasoning these mean nothing
    assert masks is not None and len(rows_of(masks)[2]) == VOCAB > len(rows_of(masks)[3])
    state.advance([7, CLOSE])
    assert set(allowed(state)) == {*brace, CALL, *ids("\n")}
    state.advance(ids("\n"))
    assert set(allowed(state)) == {*brace, CALL}
    state.advance([CALL])
    assert state.free and state.masks([5, 6]) is None
    state = grammar.start(frees=frozenset([CALL]))
    state.advance(brace)
    assert not {CALL, OPEN} & set(allowed(state))


def test_an_answer_ends_with_any_of_the_stops_and_only_where_it_may() -> None:
    state = Grammar.regex(tiny_guide(), "a+b?").start(may_think=False)
    assert not STOPS & set(allowed(state)) and not state.complete
    state.advance(ids("a"))
    assert set(allowed(state)) > STOPS and state.complete
    state.advance(ids("b"))
    assert set(allowed(state)) == STOPS
    state.advance([TURN])
    assert state.free


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_stop_within_an_accepted_run_ends_the_text(variant: str) -> None:
    truth = plainly(variant, Sample(1.1), HARD, 5)
    assert truth[-1] in STOPS
    drafter = DialledDrafter.dial(PROMPT + truth + varied_tokens(20), 1.0)
    sequence = opened(variant, drafter, Rules(Sample(1.1), HARD, "argmax"), person().start(may_think=False), 5)
    text: list[int] = []
    while not STOPS & set(text):
        result = sequence.round(4)
        text += result.tokens
    text = text[: len(truth)]
    assert text == truth
    sequence.keep(len(result.tokens) - (len(sequence.text) - len(PROMPT) - len(truth)))
    assert sequence.text == PROMPT + truth and sequence.grammar is not None and sequence.grammar.free
    sequence.grammar = None
    sequence.prefill(varied_tokens(5), 32, lambda done, total: None)
    sequence.round(2)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_opaque_samplers_and_processors_are_masked_too(temperature: float) -> None:
    variant = "gemma4_keqv"
    chain = make_logits_processors(dict(HARD.bias), 1.3, 20)
    chooser = Callables(make_sampler(temperature, top_p=0.9), chain, STOPS)
    own = tiny_pair(variant)[1]
    mx.random.seed(4)
    truth = write(variant, NoDrafter(), chooser, person().start(may_think=False), 0, 0)
    state = person().start(may_think=False)
    for token in truth:
        assert token in allowed(state)
        state.advance([token])
    for k, drafter in ((3, own), (4, DialledDrafter.dial(PROMPT + truth, 0.7))):
        mx.random.seed(4)
        assert write(variant, drafter, chooser, person().start(may_think=False), k, 0) == truth


def test_nothing_changes_where_a_grammar_forbids_nothing() -> None:
    """While the model reasons, and once the grammar is done with; then the round is one step again."""
    own = tiny_pair(FAMILIES[0])[1]
    texts = []
    done = person().start(thinking=True)
    done.advance([EOS])
    for state in (None, person().start(thinking=True), done):
        sequence = opened(FAMILIES[0], own, Rules(Sample(0.9)), state, 1)
        text: list[int] = []
        while len(text) < 20:
            text += sequence.round(3 if sequence.ready else 0).tokens
        texts.append(text[:20])
    assert CLOSE not in texts[0] and not STOPS & set(texts[0])
    assert texts[1] == texts[0] == texts[2]


def test_masks_hide_exactly_what_is_not_set() -> None:
    words = mx.array([[0b101, 1 << 31], [0, 2**32 - 1]], mx.uint32)
    shown = np.isfinite(np.array(masked(mx.zeros((2, 50)), words)))
    assert [int(token) for token in np.flatnonzero(shown[0])] == [0, 2]
    assert [int(token) for token in np.flatnonzero(shown[1])] == list(range(32, 50))
    assert masked(words, None) is words


def test_what_penalties_leave_of_a_mask_is_chosen_or_named() -> None:
    brace = ids("{")[0]
    banned = Penalties(bias=((brace, -float("inf")),))
    with pytest.raises(RequestError, match="leaves nothing that can be chosen"):
        write("gemma4_keqv", NoDrafter(), Rules(penalties=banned), person().start(may_think=False), 0, 0)


@pytest.mark.parametrize("vocabulary", [VOCAB + 45, VOCAB - 100])
def test_a_model_may_have_more_rows_or_fewer_than_the_tokenizer_has_tokens(vocabulary: int) -> None:
    guide = tiny_guide(PLAIN, vocabulary)
    state = Grammar.regex(guide, "a|b").start()
    assert guide.words * 32 >= max(vocabulary, VOCAB) and allowed(state) == sorted(ids("a") + ids("b"))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda guide: Grammar.json_schema(guide, {"type": "string", "uniqueItems": True}), '"uniqueItems" at #'),
        (lambda guide: Grammar.json_schema(guide, {"type": "string", "format": "colour"}), "Unknown format: colour"),
        (lambda guide: Grammar.json_schema(guide, {"type": "text"}), "Invalid type: text"),
        (lambda guide: Grammar.json_schema(guide, {"$ref": "https://x.test/y"}), "https://x.test/y"),
        (lambda guide: Grammar.json_schema(guide, {"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
        (lambda guide: Grammar.json_schema(guide, {"minLength": 5, "maxLength": 2, "type": "string"}), "Unsatisfiable"),
        (lambda guide: Grammar.json_schema(guide, {"const": float("nan")}), "not JSON"),
        (lambda guide: Grammar.json_schema(guide, cast(Any, [])), "give an object"),
        (lambda guide: Grammar.json_schema(guide, {"description": "a" * 2**18}), "characters; the most is"),
        (lambda guide: Grammar.regex(guide, "(a"), "unclosed group"),
        (lambda guide: Grammar.regex(guide, ""), "give text"),
        (lambda guide: Grammar.lark(guide, "start: foo"), 'unknown name: "foo"'),
        (lambda guide: Grammar.choice(guide, []), "texts to choose from"),
        (lambda guide: Guide.of(tiny_tokenizer(), VOCAB, frozenset(), PLAIN), "no token that ends a text"),
        (lambda guide: Grammar.regex(tiny_guide(PLAIN), "a").start(thinking=True), "no token of this model's"),
    ],
)
def test_a_request_that_cannot_be_kept_is_named_on_one_line(make: Callable[[Guide], object], named: str) -> None:
    with pytest.raises(RequestError) as error:
        make(tiny_guide())
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_draft_beyond_the_limits_does_no_harm_until_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIMITS", LLParserLimits(step_max_items=120, verbose_errors=False))
    guide = Guide.of(tiny_tokenizer(), VOCAB, STOPS, PLAIN)
    many = " | ".join(f"y{i}" for i in range(200))
    rules = "".join(f'\ny{i}: "c" y{i} "{chr(97 + i % 26)}" | "d{i}"' for i in range(200))
    state = Grammar.lark(guide, f'start: "a" "}}" "~" x | "b"\nx: {many}{rules}').start()
    state.advance(ids("a"))
    before = allowed(state)
    masks = state.masks([*ids("}~"), *ids("d")])
    assert masks is not None and not rows_of(masks)[1] and allowed(state) == before
    state.advance(ids("}"))
    with pytest.raises(RequestError, match="Too many items"):
        state.masks([])


def test_compiled_grammars_are_shared_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPILED", 2)
    guide = Guide.of(tiny_tokenizer(), VOCAB, STOPS, PLAIN)
    first = Grammar.regex(guide, "a")
    assert Grammar.regex(guide, "a")._matcher is first._matcher
    assert Grammar.regex(guide, "b")._matcher is not first._matcher
    with ThreadPoolExecutor(4) as pool:
        assert len({id(grammar._matcher) for grammar in pool.map(lambda _: Grammar.regex(guide, "c"), range(8))}) == 1
    assert Grammar.regex(guide, "a")._matcher is not first._matcher
    one, two = first.start(), first.start()
    one.advance(ids("a"))
    assert set(allowed(two)) == set(ids("a"))
