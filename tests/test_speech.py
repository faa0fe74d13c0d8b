"""A reply, token by token: what is content, what is reasoning, what is a call."""

import logging
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replies import (
    GEMMA,
    GEMMA_MARKERS,
    QWEN,
    QWEN_MARKERS,
    TEXT,
    TOOLS,
    Piece,
    cut,
    detokenized,
    dialect,
    pieces,
    say,
)

from mtp_mlx.dialects import PLAIN, Dialect, find_dialect
from mtp_mlx.marks import Mark
from mtp_mlx.speech import Content, Parser, Reason, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart

settings.register_profile("speech", max_examples=120, deadline=None, derandomize=True, database=None)
settings.load_profile("speech")

GEMMA_CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
QWEN_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
CALLED = ("weather", {"city": "Paris", "days": 3})


# dialects


def test_a_dialect_is_told_from_the_vocabulary() -> None:
    assert GEMMA.syntax == "braces" and len(GEMMA.stops) == 1
    assert QWEN.syntax == "tags" and not QWEN.stops
    assert all(marker.id is not None for marker in (*GEMMA.markers, *QWEN.markers))
    assert find_dialect({"a": 0}) is PLAIN


def test_a_model_without_markers_says_only_content() -> None:
    text = "<think> <tool_call>\n<function=f></function></tool_call>\n"
    assert say(PLAIN, [(1, text)]).content == text


# reasoning


def test_reasoning_of_gemma() -> None:
    said = say(GEMMA, "<|channel>thought\nFirst,\nthen.\n<channel|>Answer.\n")
    assert (said.reasoning, said.content) == ("First,\nthen.", "Answer.\n")


def test_empty_reasoning_of_gemma_says_nothing() -> None:
    for text in ("<|channel>thought\n<channel|>Answer", "<|channel>thought<channel|>Answer", "<channel|>Answer"):
        assert say(GEMMA, text).events == [Content("Answer")]


def test_gemma_may_think_again_between_calls() -> None:
    said = say(GEMMA, f"<|channel>thought\none<channel|>{GEMMA_CALL}<|channel>thought\ntwo<channel|>{GEMMA_CALL}")
    assert said.reasoning == "onetwo" and said.content == "" and said.calls == [CALLED, CALLED]


def test_another_channel_than_thought_is_content() -> None:
    for text in ("<|channel>final\nHello", "<|channel>thoughts", "<|channel>tho", "The `<|channel>thought\n` marker"):
        said = say(GEMMA, text)
        assert (said.content, said.reasoning) == (text, "")


def test_generation_of_qwen_starts_within_reasoning() -> None:
    said = say(QWEN, "Hm.\n</think>\n\nAnswer.\n", thinking=True)
    assert (said.reasoning, said.content) == ("Hm.", "Answer.\n")


def test_reasoning_that_never_ends_is_reasoning() -> None:
    said = say(QWEN, "Hm.\n", thinking=True, reason="length")
    assert (said.reasoning, said.content, said.finish_reason) == ("Hm.\n", "", "length")


def test_qwen_may_open_reasoning_itself_but_only_at_the_beginning() -> None:
    assert say(QWEN, "<think>\nHm.").events[0] == Reasoning("Hm.")
    said = say(QWEN, "\n<think>\nHm.\n</think>\n\nYes")
    assert (said.reasoning, said.content) == ("Hm.", "Yes")
    text = "Use <think> and </think>."
    assert say(QWEN, text).content == text


def test_reasoning_opened_twice_is_opened_once() -> None:
    said = say(QWEN, "<think>\nHm.\n</think>\n\nYes", thinking=True)
    assert (said.reasoning, said.content) == ("Hm.", "Yes")


@pytest.mark.parametrize("quote", ["'", '"', "`"])
def test_a_quoted_marker_does_not_end_reasoning(quote: str) -> None:
    said = say(QWEN, f"They ask about {quote}</think>{quote}.\n</think>\n\nYes", thinking=True)
    assert (said.reasoning, said.content) == (f"They ask about {quote}</think>{quote}.", "Yes")
    said = say(QWEN, f"I say {quote}so{quote}</think>Yes", thinking=True)
    assert (said.reasoning, said.content) == (f"I say {quote}so{quote}", "Yes")


@pytest.mark.parametrize("family", [GEMMA, QWEN], ids=lambda family: family.name)
@pytest.mark.parametrize("thinking", [False, True])
def test_prose_that_spells_markers_is_text(family: Dialect, thinking: bool) -> None:
    text = "".join(f"Write {marker} {marker}x\n" for marker in GEMMA_MARKERS + QWEN_MARKERS) + GEMMA_CALL + QWEN_CALL
    for size in (1, 5, len(text)):
        said = say(family, cut([(TEXT, text)], size), thinking=thinking)
        assert (said.reasoning if thinking else said.content) == text and not said.names


def test_markers_without_an_id_are_found_in_the_text() -> None:
    partial = dialect("<think>", "</think>")
    text = f"Hm <tool_ call>\n</think>\n\nSo <tool_cal{QWEN_CALL}<tool_"
    for size in (1, 2, 7, 1000):
        said = say(partial, cut(pieces(partial, text), size), thinking=True)
        assert said.reasoning == "Hm <tool_ call>" and said.content == "So <tool_cal<tool_" and said.calls == [CALLED]


# calls


@pytest.mark.parametrize(("family", "call"), [(GEMMA, GEMMA_CALL), (QWEN, QWEN_CALL)], ids=["gemma", "qwen"])
def test_calls_come_out_in_order_and_end_the_reply(family: Dialect, call: str) -> None:
    said = say(family, f"I look.\n\n{call}\n{call}\n")
    assert said.content == "I look." and said.calls == [CALLED, CALLED] and said.finish_reason == "tool_calls"
    kinds = [type(event) for event in said.events if not isinstance(event, Content | ToolCallArguments)]
    assert kinds == [ToolCallStart, ToolCallEnd] * 2


@pytest.mark.parametrize(("family", "call"), [(GEMMA, GEMMA_CALL), (QWEN, QWEN_CALL)], ids=["gemma", "qwen"])
def test_text_around_calls_is_kept(family: Dialect, call: str) -> None:
    said = say(family, f"Before {call}\nbetween {call} after")
    assert said.content == "Before between  after" and said.calls == [CALLED, CALLED]


def test_a_call_within_unclosed_reasoning_is_a_call() -> None:
    said = say(QWEN, f"I should look.\n{QWEN_CALL}", thinking=True)
    assert (said.reasoning, said.content, said.calls) == ("I should look.", "", [CALLED])
    said = say(QWEN, f"Look. {QWEN_CALL} More.\n</think>\n\nYes", thinking=True)
    assert (said.reasoning, said.content, said.calls) == ("Look.  More.", "Yes", [CALLED])
    said = say(GEMMA, f"<|channel>thought\nLook.{GEMMA_CALL}")
    assert (said.reasoning, said.calls) == ("Look.", [CALLED])


def test_a_marker_in_prose_begins_no_call() -> None:
    for thinking in (False, True):
        said = say(QWEN, f"Wrap it in `<tool_call>` and </tool_call>. {QWEN_CALL}", thinking=thinking)
        assert (said.reasoning if thinking else said.content) == "Wrap it in `<tool_call>` and </tool_call>. "
        assert said.calls == [CALLED]
    said = say(GEMMA, f'Wrap it in <|tool_call>, <|"|> and <tool_call|>. {GEMMA_CALL}')
    assert said.content == 'Wrap it in <|tool_call>, <|"|> and <tool_call|>. ' and said.calls == [CALLED]


def test_without_tools_nothing_is_a_call() -> None:
    for family, call in ((GEMMA, GEMMA_CALL), (QWEN, QWEN_CALL)):
        said = say(family, call, tools={})
        assert said.content == call and said.finish_reason == "stop"


def test_a_tool_response_ends_the_generation_of_gemma_and_is_not_text() -> None:
    (stop,) = GEMMA.stops
    said = say(GEMMA, [*pieces(GEMMA, GEMMA_CALL), (stop, "<|tool_response>")])
    assert said.content == "" and said.calls == [CALLED]
    # A generator gives a stop token's place the text that its detokenizer still holds.
    said = say(GEMMA, [(TEXT, "Caf"), (stop, "\ufffd")])
    assert said.content == "Caf\ufffd"


@pytest.mark.parametrize(("family", "call"), [(GEMMA, GEMMA_CALL), (QWEN, QWEN_CALL)], ids=["gemma", "qwen"])
def test_a_truncated_call_comes_back_as_text_with_a_warning(
    family: Dialect, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    parts = re.split("(<tool_call>|<.tool_call>)", call)
    whole = parts[1] + parts[2][: parts[2].index("3") + 1]
    for end in range(len(parts[1]), len(whole)):
        text = whole[:end]
        if '<|"' in text[-5:] and not text.endswith('<|"|>'):
            continue  # a marker is one token: it cannot be cut
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mtp_mlx.speech"):
            said = say(family, f"So: {text}", reason="length")
        assert said.content == f"So: {text}" and said.calls == [] and said.finish_reason == "length"
        assert len(caplog.records) == 1 and "Paris" not in caplog.text


def test_a_call_that_was_cut_off_does_not_count_but_its_sibling_does() -> None:
    said = say(GEMMA, GEMMA_CALL + GEMMA_CALL[:-25], reason="length")
    assert said.calls == [CALLED] and said.finish_reason == "length"
    said = say(GEMMA, GEMMA_CALL + "<|tool_call>call:weather{city", reason="stop")
    assert said.calls == [CALLED] and said.content == "<|tool_call>call:weather{city"
    assert said.finish_reason == "tool_calls"


def test_the_finish_reason_of_a_broken_call_is_stop() -> None:
    said = say(GEMMA, "<|tool_call>call:weather{city}<tool_call|>")
    assert said.content == "<|tool_call>call:weather{city}<tool_call|>" and said.finish_reason == "stop"


def test_arguments_stream() -> None:
    text = "x" * 1000
    for family, call in ((GEMMA, GEMMA_CALL), (QWEN, QWEN_CALL)):
        stream = cut(pieces(family, call.replace("Paris", text)), 10)
        parser = Parser(family, tools=TOOLS)
        before_the_end = [event for token, piece in stream[:90] for event in parser.feed(token, piece)]
        fragments = "".join(event.fragment for event in before_the_end if isinstance(event, ToolCallArguments))
        assert fragments.startswith('{"city":"xxx') and len(fragments) > 700


def test_ids_of_calls_differ() -> None:
    parser = Parser(GEMMA, tools=TOOLS)
    events = [event for token, text in pieces(GEMMA, GEMMA_CALL * 2) for event in parser.feed(token, text)]
    first, second = (event.id for event in events if isinstance(event, ToolCallStart))
    assert first != second


# any cut gives the same


REPLIES = [
    (GEMMA, f"<|channel>thought\nlet me\n\n<channel|>\nSo\n\n{GEMMA_CALL}{GEMMA_CALL}\n<|tool_response>"),
    (GEMMA, "x <|tool_call>call:a.b/c{@k-1:None, u:celsius,o:{p:[1,\"a\\n\\u00e9\",'it's'],q:{}}}}<tool_call|>é🙂"),
    (GEMMA, '<|tool_call>call:weather{city:<|"|>a}b<|"|>]<tool_call|> rest <|channel>thoughtful'),
    (QWEN, f"hm '</think>' so\n</think>\n\nI\n\n{QWEN_CALL}\n{QWEN_CALL.replace('3', 'x < y')}"),
    (QWEN, f"{QWEN_CALL.replace('Paris', 'a</parameter> b </function> <tool_call> é')} <tool_call> </func"),
    (QWEN, '<tool_call>\n{"name": "time", "arguments": {"a": [1]}}\n</tool_call><tool_call>{"name": 3}</tool_call>'),
    (QWEN, QWEN_CALL.replace("\n</parameter>", "</parameter>\n</parameter>").replace("</function>", "") + "</think>"),
]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(("family", "text"), REPLIES)
def test_a_reply_cut_anywhere_says_the_same(family: Dialect, text: str, thinking: bool) -> None:
    whole = say(family, text, thinking=thinking)
    stream = pieces(family, text)
    for i, (token, part) in enumerate(stream):
        for at in range(1, len(part) if token == TEXT else 0):
            halves = [*stream[:i], (TEXT, part[:at]), (TEXT, part[at:]), *stream[i + 1 :]]
            _same(say(family, halves, thinking=thinking), whole)
    for size in (1, 2, 3):
        _same(say(family, cut(stream, size), thinking=thinking), whole)


def _same(said: object, other: object) -> None:
    for name in ("content", "reasoning", "names", "fragments", "ended"):
        assert vars(said)[name] == vars(other)[name]


@pytest.mark.parametrize(("family", "text"), REPLIES)
def test_tokens_of_a_real_tokenizer_say_the_same(family: Dialect, text: str) -> None:
    markers = GEMMA_MARKERS if family is GEMMA else QWEN_MARKERS
    _same(say(family, detokenized(markers, text)), say(family, text))


# anything at all


def _scraps(family: Dialect) -> st.SearchStrategy[list[Piece]]:
    markers = [(marker.id or 0, marker.text) for marker in family.markers]
    words = [
        "\n",
        " ",
        "thought\n",
        "call:",
        "weather",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "city",
        "days",
        "3",
        "'",
        '"',
        "\\",
    ]
    words += [
        "<function=weather>",
        "<parameter=city>",
        "</parameter>",
        "</function>",
        "<",
        "null",
        "a",
        "é",
        "call:f{a:",
    ]
    return st.lists(st.one_of(st.sampled_from(markers), st.sampled_from([(TEXT, word) for word in words])), max_size=30)


def _spoken(text: str) -> str:
    """A text without markers, titles and line breaks, which may or may not have been said."""
    for marker in (*GEMMA_MARKERS, *QWEN_MARKERS, "thought", "\n"):
        text = text.replace(marker, "")
    return text


@pytest.mark.parametrize("family", [GEMMA, QWEN], ids=lambda family: family.name)
@given(st.data())
def test_whatever_comes_nothing_raises_and_nothing_is_lost(family: Dialect, data: st.DataObject) -> None:
    stream = data.draw(_scraps(family))
    thinking = data.draw(st.booleans())
    reason: Reason = data.draw(st.sampled_from(["stop", "length"]))
    said = say(family, stream, thinking=thinking, reason=reason)
    for _, arguments in said.calls:
        assert isinstance(arguments, dict)
    if not said.ended and family is QWEN:
        assert _spoken(said.reasoning + said.content) == _spoken("".join(text for _, text in stream))
    if not said.ended and family is GEMMA:  # thoughts may stand between
        assert sorted(_spoken(said.reasoning + said.content)) == sorted(_spoken("".join(text for _, text in stream)))
    assert (said.finish_reason == "tool_calls") == (bool(said.ended) and reason == "stop")
    _same(say(family, cut(stream, 1), thinking=thinking, reason=reason), said)


@given(st.lists(st.tuples(st.integers(0, 310), st.text(max_size=8)), max_size=20), st.booleans())
def test_tokens_and_texts_that_do_not_belong_together_do_not_raise(stream: list[Piece], thinking: bool) -> None:
    for family in (GEMMA, QWEN, PLAIN):
        say(family, stream, thinking=thinking)


def test_text_cannot_forge_a_marker() -> None:
    forged = "".join(Mark) + "call:weather{}" + Mark.CALL_CLOSE
    said = say(GEMMA, [(TEXT, forged)])
    assert not said.names and said.content == "\ufffd" * len(Mark) + "call:weather{}\ufffd"


@pytest.mark.parametrize("family", [GEMMA, QWEN], ids=lambda family: family.name)
@given(st.data())
def test_plain_text_is_content_as_it_is(family: Dialect, data: st.DataObject) -> None:
    text = data.draw(st.text())
    at = data.draw(st.integers(0, len(text)))
    assert say(family, [(TEXT, text[:at]), (TEXT, text[at:])]).content == text
