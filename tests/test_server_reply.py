"""A reply says the same however its tokens come: in any pieces, as a stream or as one body, in both families."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from replies import (
    GEMMA,
    GEMMA_MARKERS,
    QWEN,
    QWEN_MARKERS,
    TEXT,
    TOOLS,
    cut,
    gemma_call,
    pieces,
    qwen_call,
    say,
    tokenizer,
)
from replies import Piece as Spoken
from talks import BRACES, CITY, TAGS, WEATHER, answer, call, conversations, result, user
from talks import tokenizer as talking
from test_server_chat import fold

from mtp_mlx.conversation import Talk
from mtp_mlx.dialects import Dialect, find_dialect
from mtp_mlx.engine import Piece, Token
from mtp_mlx.server.asking import Task, Voice
from mtp_mlx.server.chat import Chat
from mtp_mlx.server.reply import Reply
from mtp_mlx.server.shape import Frame
from mtp_mlx.server.wire import ChatRequest
from mtp_mlx.stats import Stats

BODY = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]})
SENTENCES = st.sampled_from(["", "Well.\n", "naïve \U0001f600 text", "a < b, `x`", '{"a": [1]}', "\n\nend\n"])
VALUES = st.one_of(
    st.integers(-5, 10**17), st.sampled_from(["Paris", "", "a\nb", '"', "{}", "</parameter", "ö\U0001f600"])
)
CALLS = st.lists(st.dictionaries(st.sampled_from(["city", "days"]), VALUES, max_size=2), max_size=2)


@cache
def words(*markers: str) -> TokenizerWrapper:
    return TokenizerWrapper(tokenizer(*markers), BPEStreamingDetokenizer, eos_token_ids={0})


def gemma_reply(thought: str, calls: Sequence[dict[str, Any]], text: str) -> list[Spoken]:
    opened = pieces(GEMMA, f"<|channel>thought\n{thought}<channel|>") if thought else []
    return [*opened, *(part for call in calls for part in gemma_call("weather", call)), *pieces(GEMMA, text)]


def qwen_reply(thought: str, calls: Sequence[dict[str, Any]], text: str) -> list[Spoken]:
    called = [part for call in calls for part in [*qwen_call("weather", call), (TEXT, "\n")]]
    return [*pieces(QWEN, f"{thought}\n</think>\n\n" if thought else ""), *pieces(QWEN, text), *called]


def answered(
    dialect: Dialect, stream: Sequence[Spoken], borders: Sequence[int], reason: Any, thinking: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The message of one body, and of a stream put together, where pieces of the engine end at these borders."""
    voice = Voice(chat=True, tools=TOOLS, starts_thinking=thinking)
    reply = Reply(dialect, voice, [1], lambda token: "")
    markers = GEMMA_MARKERS if dialect is GEMMA else QWEN_MARKERS
    shape = Chat(Frame("id", "m", "f"), BODY, Task((), voice), [reply], words(*markers))
    chunks = shape.begin()
    ends = sorted({border % (len(stream) + 1) for border in borders} | {len(stream)})
    start = 0
    for end in ends:
        tokens = tuple(Token(token, text, "plain") for token, text in stream[start:end])
        last = end == len(stream)
        delta = reply.feed(Piece(tokens, Stats(1), reason if last else None))
        chunks += shape.add(0, delta) if delta else []
        start = end
    return shape.whole([reply])["choices"][0], fold(json.loads(json.dumps(chunks)))


@pytest.mark.parametrize("dialect", [GEMMA, QWEN], ids=["gemma", "qwen"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), thought=SENTENCES, calls=CALLS, text=SENTENCES, reason=st.sampled_from(["stop", "length"]))
def test_any_pieces_give_the_same_stream_and_body(
    dialect: Dialect, data: st.DataObject, thought: str, calls: list[dict[str, Any]], text: str, reason: str
) -> None:
    spoken = gemma_reply(thought, calls, text) if dialect is GEMMA else qwen_reply(thought, calls, text)
    spoken = cut(spoken, data.draw(st.integers(1, 9)))
    spoken = spoken[: data.draw(st.integers(0, len(spoken)))] if data.draw(st.booleans()) else spoken
    thinking = dialect is QWEN and bool(thought)
    borders = data.draw(st.lists(st.integers(0, len(spoken)), max_size=len(spoken)))
    body, streamed = answered(dialect, spoken, borders, reason, thinking)
    whole, at_once = answered(dialect, spoken, [], reason, thinking)
    one_by_one, _ = answered(dialect, spoken, range(len(spoken)), reason, thinking)
    expected = say(dialect, spoken, thinking=thinking, reason=reason)  # type: ignore[arg-type]
    for choice in (body, whole, one_by_one):
        message = choice["message"]
        assert (message["content"] or "") == expected.content
        assert message.get("reasoning_content", "") == expected.reasoning
        assert choice["finish_reason"] == expected.finish_reason
        calls_made = [call["function"] for call in message.get("tool_calls", [])]
        assert [(call["name"], json.loads(call["arguments"])) for call in calls_made] == expected.calls
        assert (choice["finish_reason"] == "tool_calls") <= bool(calls_made)
    for said in (streamed, at_once):
        assert (said["content"], said["reasoning_content"]) == (expected.content, expected.reasoning)
        assert said["finish"] == expected.finish_reason
        assert said["calls"] == dict(enumerate(zip(expected.names, expected.fragments, strict=True)))


def test_a_whole_conversation_is_read_in_both_families() -> None:
    """What the strategies above are made of means what it should."""
    arguments = {"city": "Paris", "days": 3}
    for dialect, spoken, thinking in (
        (GEMMA, gemma_reply("Hm.", [arguments], "Done."), False),
        (QWEN, qwen_reply("Hm.", [arguments], "Done."), True),
    ):
        body, streamed = answered(dialect, cut(spoken, 1), [3, 7], "stop", thinking)
        assert body["message"]["content"] == "Done." and body["message"]["reasoning_content"] == "Hm."
        assert body["finish_reason"] == streamed["finish"] == "tool_calls"
        assert json.loads(streamed["calls"][0][1]) == arguments


@pytest.mark.parametrize("template", [TAGS, BRACES], ids=["tags", "braces"])
@pytest.mark.parametrize("calls", [[], [{"city": "Paris", "days": 3}], [{"city": "a b"}, {"city": "ö", "days": -1}]])
def test_what_a_template_wrote_is_read_and_written_again(template: str, calls: list[dict[str, Any]]) -> None:
    talk, words = conversations(template), talking(template)
    asked, tools = [user("Weather?")], [WEATHER]
    # Gemma's template leaves out thoughts that lead to no call.
    thought = "First this,\nthen that." if calls or template is TAGS else ""
    made = [call(each, key=f"call_{number}") for number, each in enumerate(calls)]
    said = answer("" if calls and template is BRACES else "Well, so.", reasoning_content=thought, tool_calls=made)
    follow = [result("dry", f"call_{number}") for number in range(len(made))] if made else []
    prompt = talk.prompt(Talk(asked, tools, thinking=True))
    before = talk.text(Talk(asked, tools, thinking=True))
    first = talk.text(Talk([*asked, said, *follow], tools, thinking=True))
    assert first.startswith(before)
    written = first[len(before) :].partition("<|im_end|>" if template is TAGS else "<tool_call|><|tool_response>")[0]
    written += "<tool_call|>" * (template is BRACES and bool(calls))
    written = written.partition("<turn|>")[0]
    dialect = find_dialect(words.get_vocab())
    ids = words.encode(written, add_special_tokens=False)
    spoken = list(zip(ids, streamed_texts(words, ids), strict=True))
    read = Reply(dialect, Voice(True, {"weather": CITY}, prompt.starts_thinking), prompt.ids, lambda token: "")
    tokens = tuple(Token(token, text, "plain") for token, text in spoken)
    read.feed(Piece(tokens, Stats(1), "stop"))
    assert [json.loads(arguments) for _, _, arguments in read.calls.values()] == calls
    assert (read.thoughts, read.content) == (thought, said["content"])
    again = [call(arguments, name, made[i]["id"]) for i, (_, name, arguments) in read.calls.items()]
    echoed = answer(read.content, reasoning_content=read.thoughts, tool_calls=again)
    assert talk.text(Talk([*asked, echoed, *follow], tools, thinking=True)) == first


def streamed_texts(words: TokenizerWrapper, ids: list[int]) -> list[str]:
    """What a detokenizer gives for each token."""
    detokenizer, texts = words.detokenizer, []
    for token in ids:
        detokenizer.add_token(token)
        texts.append(detokenizer.last_segment)
    detokenizer.finalize()
    return [*texts[:-1], texts[-1] + detokenizer.last_segment]
