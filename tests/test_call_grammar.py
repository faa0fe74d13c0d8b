"""Whatever a grammar of calls lets through, the parser reads as calls: of these tools, with these arguments."""

import random
from typing import Any, cast

import pytest
from replies import GEMMA, GEMMA_MARKERS, QWEN, QWEN_MARKERS, Said, tokenizer
from test_grammar import allowed

from mtp_mlx.call_grammar import call_grammar
from mtp_mlx.dialects import PLAIN, Dialect
from mtp_mlx.errors import RequestError
from mtp_mlx.grammar import Grammar, GrammarState, Guide
from mtp_mlx.speech import Parser

STOP = 5
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["c", "f"]},
        "where": {"type": "object"},
        "tags": {"type": ["array", "null"]},
        "deep": {"type": "boolean"},
        "any": {},
    },
    "required": ["city", "deep"],
}
TOOLS: dict[str, object] = {"weather": WEATHER, "time": {}, "now": {"properties": {}, "additionalProperties": False}}
DIALECTS = {"tags": (QWEN, tuple(QWEN_MARKERS)), "braces": (GEMMA, tuple(GEMMA_MARKERS))}
GUIDES: dict[str, Guide] = {}


def _guide(name: str) -> Guide:
    dialect, markers = DIALECTS[name]
    made = tokenizer(*markers)
    return GUIDES.setdefault(name, Guide(made.backend_tokenizer, len(made), frozenset([STOP]), dialect))


def _written(state: GrammarState, guide: Guide, rng: random.Random) -> list[int]:
    """A text that ends by itself: tokens at random, closing tags and markers more often than others."""
    ends = [guide.backend.token_to_id(piece) for piece in ("<", "/", ">", "}", "]", "ion")]
    ends += [marker.id for marker in guide.dialect.markers if marker.id is not None]
    closing = guide.backend.encode("</parameter>").ids
    tokens: list[int] = []
    while len(tokens) < 400:
        found = allowed(state)
        if STOP in found and (len(found) == 1 or rng.random() < 0.7):
            return tokens
        found = [token for token in found if token != STOP]
        likely = [token for token in ends if token in found]
        run = [rng.choice(likely if likely and rng.random() < 0.4 else found)]
        if rng.random() < 0.2 and all(token in found for token in closing[:1]):
            run = closing
        for token in run:
            if token not in allowed(state):
                break
            state.advance([token])
            tokens.append(token)
    return []


def _said(name: str, tokens: list[int]) -> Said:
    dialect, markers = DIALECTS[name]
    parser, said, text = Parser(dialect, tools=TOOLS), Said(), ""
    made = tokenizer(*markers)
    for i, token in enumerate(tokens):
        whole = cast(str, made.decode(tokens[: i + 1]))
        whole = whole if not whole.endswith("\ufffd") else text
        for event in parser.feed(token, whole[len(text) :]):
            said.add(event)
        text = whole
    for event in parser.finish("stop"):
        said.add(event)
    return said


def _fits(name: str, arguments: dict[str, Any]) -> bool:
    if name == "now":
        return not arguments
    if name == "time":
        return True
    kinds = {"city": str, "days": int, "unit": str, "where": dict, "tags": list | None, "deep": bool, "any": object}
    right = all(isinstance(value, kinds[key]) for key, value in arguments.items())
    order = [key for key in WEATHER["properties"] if key in arguments]
    return right and arguments.get("unit", "c") in ("c", "f") and {"city", "deep"} <= set(order) == set(arguments)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_text_that_ends_is_calls_of_the_tools(name: str) -> None:
    guide = _guide(name)
    grammar = Grammar.tool_calls(guide, guide.dialect, TOOLS)
    ended = several = 0
    for seed in range(40):
        tokens = _written(grammar.start(may_think=False), guide, random.Random(seed))
        if tokens:
            said = _said(name, tokens)
            assert not said.content and not said.reasoning and len(said.ended) == len(said.names) > 0
            assert all(_fits(*call) for call in said.calls), said.calls
            ended += 1
            several += len(said.calls) > 1
    assert ended > 20 and several


@pytest.mark.parametrize("name", DIALECTS)
def test_a_text_begins_with_a_call_of_a_known_tool(name: str) -> None:
    guide = _guide(name)
    state = Grammar.tool_calls(guide, guide.dialect, {"weather": WEATHER}).start(may_think=False)
    opening = [marker.id for marker in guide.dialect.markers if marker.text in ("<tool_call>", "<|tool_call>")]
    assert allowed(state) == opening
    head = {"tags": "<tool_call>\n<function=weather>", "braces": "<|tool_call>call:weather{"}[name]
    state.advance(guide.backend.encode(head).ids)
    wrong = Grammar.tool_calls(guide, guide.dialect, {"weather": WEATHER}).start(may_think=False)
    tokens = guide.backend.encode(head.replace("weather", "wether")).ids
    with pytest.raises(AssertionError, match="forbidden"):
        wrong.advance(tokens)


@pytest.mark.parametrize(
    ("dialect", "tools", "named"),
    [
        (PLAIN, TOOLS, "not known how this model writes a call"),
        (QWEN, {}, "no tools"),
        (QWEN, {"a>b": {}}, "tool 'a>b'"),
        (QWEN, {"a": {"properties": {"x y": {}}}}, "argument 'x y'"),
        (GEMMA, {"a{": {}}, "tool 'a{'"),
        (GEMMA, {"a": {"properties": {"x:": {}}}}, "argument 'x:'"),
    ],
)
def test_what_a_dialect_cannot_write_is_an_error(dialect: Dialect, tools: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        call_grammar(dialect, tools)
