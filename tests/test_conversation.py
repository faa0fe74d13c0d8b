"""A conversation's prompt: the template's text, the ids of earlier turns, the places where others may differ."""

from threading import Thread
from typing import Any

import pytest
from conftest import FIXTURES
from talks import (
    BRACES,
    CITY,
    FIELDS,
    STRICT,
    TAGS,
    WEATHER,
    answer,
    call,
    conversations,
    result,
    system,
    tokenizer,
    user,
)

from mtp_mlx.conversation import EFFORTS, Conversations, Talk
from mtp_mlx.dialects import PLAIN, Dialect, find_dialect
from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.hub import DEMO
from mtp_mlx.loading import load
from mtp_mlx.speech import Content, Event, Parser, Reasoning, ToolCallArguments, ToolCallStart
from mtp_mlx.templates import Template

TALK = [system("Be brief."), user("hello"), answer("hello"), user("the answer?")]


def _text(ids: list[int], template: str = TAGS) -> str:
    text: str = tokenizer(template).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


# prompts


@pytest.mark.parametrize("template", [TAGS, BRACES, STRICT, FIELDS])
def test_ids_are_those_of_the_rendered_text(template: str) -> None:
    chat = conversations(template)
    prompt = chat.prompt(Talk(TALK))
    assert prompt.ids == tokenizer(template).encode(chat.text(Talk(TALK)), add_special_tokens=False)
    assert chat.text(Talk(TALK)).endswith(_text(prompt.ids[-3:], template))


def test_a_prompt_is_what_the_library_makes_of_it() -> None:
    _, wrapper = load(FIXTURES / "gemma4_keqv")
    messages = [user("hello"), answer("a"), user("b")]
    prompt = Conversations(wrapper, find_dialect(wrapper.get_vocab())).prompt(Talk(messages))
    assert prompt.ids == wrapper.apply_chat_template(messages, add_generation_prompt=True)


def test_a_model_without_template_cannot_chat_but_encode() -> None:
    _, wrapper = load(DEMO)
    chat = Conversations(wrapper, PLAIN)
    assert not chat.has_template and conversations().has_template
    for ask in (chat.prompt, chat.text):
        with pytest.raises(CheckpointError, match="no chat template"):
            ask(Talk([user("hello")]))
    assert chat.encode("def f") == wrapper.encode("def f") != chat.encode("def f", special=False)
    assert chat.encode("<bos>def f") == wrapper.encode("def f") and chat.encode("") == []


# options


def test_a_switch_that_a_template_does_not_have_is_refused() -> None:
    for wanted in (True, False):
        conversations().check_switch(wanted)
        with pytest.raises(RequestError, match="no switch for thinking; leave --think and --no-think out"):
            conversations(STRICT).check_switch(wanted)
    conversations(STRICT).check_switch(None)


def test_thinking_is_switched() -> None:
    chat = conversations()
    assert chat.text(Talk(TALK, thinking=True)).endswith("<think>\n")
    assert chat.text(Talk(TALK, thinking=False)).endswith("</think>\n\n")
    assert "<|think|>" in conversations(BRACES).text(Talk(TALK, thinking=True))
    assert "<|think|>" not in conversations(BRACES).text(Talk(TALK, thinking=False))


@pytest.mark.parametrize("effort", EFFORTS)
def test_effort_switches_thinking_and_reaches_the_template(effort: str) -> None:
    chat = conversations("{{ messages[0].content }}|{{ enable_thinking }}|{{ reasoning_effort }}")
    assert chat.text(Talk([user("a")], effort=effort)) == ("a|False|" if effort == "none" else f"a|True|{effort}")
    assert chat.text(Talk([user("a")], effort=effort, thinking=False)).startswith("a|False|")


def test_options_reach_the_template() -> None:
    chat = conversations()
    messages = [user("a"), answer("b", reasoning_content="because"), user("c")]
    assert "because" not in chat.text(Talk(messages))
    assert "because" in chat.text(Talk(messages, template_options={"preserve_thinking": True}))
    assert chat.text(Talk(messages, template_options={"enable_thinking": False})).endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({name: "x"}, f"{name!r} cannot be set") for name in ("messages", "tools", "chat_template", "bos_token")),
        *(({name: True}, f"{name!r} cannot be set") for name in ("tokenize", "add_generation_prompt", "tojson")),
        ({3: True}, "3 cannot be set"),
        ({"deep": [1]}, "deep is .1.; give a text, a number"),
        ({"wide": float("nan")}, "wide is nan"),
        ({"bad": "\ud800"}, "UTF-8"),
        ([], r"options are \[\]; give an object"),
    ],
)
def test_options_that_are_none_are_refused(options: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        conversations().prompt(Talk(TALK, template_options=options))


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(RequestError, match="give one of the two"):
        conversations().prompt(Talk(TALK, thinking=True, template_options={"enable_thinking": False}))
    with pytest.raises(RequestError, match="reasoning effort is 'huge'; use one of none, minimal"):
        conversations().prompt(Talk(TALK, effort="huge"))


def test_text_that_no_utf8_holds_is_refused() -> None:
    with pytest.raises(RequestError, match="UTF-8"):
        conversations().encode("a\ud800")


# an answer that goes on


@pytest.mark.parametrize("template", [TAGS, BRACES, STRICT])
def test_the_last_message_is_continued_where_it_stops(template: str) -> None:
    chat = conversations(template)
    messages = [user("hello"), answer("the answer is ")]
    text = chat.text(Talk(messages, continue_last=True))
    assert text.endswith("the answer is ") and text.count("the answer") == 1
    assert chat.prompt(Talk(messages, continue_last=True)).ids[-1:] == chat.encode("is ", special=False)[-1:]


def test_the_beginning_of_what_is_continued_is_a_mark() -> None:
    prompt = conversations(BRACES).prompt(Talk([user("hello"), answer("the answer")], continue_last=True))
    assert _text(prompt.ids[: prompt.marks[-1]], BRACES).endswith("hello<turn|>\n<|turn>")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([user("a")], "last message is of role user"),
        ([user("a"), answer("", tool_calls=[call("{}")])], "calls tools"),
    ],
)
def test_only_a_message_of_the_assistant_is_continued(messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        conversations().prompt(Talk(messages, continue_last=True))


def test_a_template_that_drops_what_is_to_be_continued_is_refused() -> None:
    with pytest.raises(RequestError, match="drops the last message"):
        conversations("{{ messages[0].content }}").prompt(Talk([user("a"), answer("b")], continue_last=True))


# reasoning


def test_a_prompt_knows_whether_it_ends_in_reasoning() -> None:
    assert conversations().prompt(Talk(TALK, thinking=True)).starts_thinking
    assert not conversations().prompt(Talk(TALK, thinking=False)).starts_thinking
    assert not conversations(BRACES).prompt(Talk(TALK, thinking=True)).starts_thinking
    opened = BRACES.removesuffix("{% endif %}") + "{{- '<|channel>thought\n' }}{% endif %}"
    assert conversations(opened).prompt(Talk(TALK, thinking=True)).starts_thinking


def test_mere_text_does_not_start_reasoning() -> None:
    plain = "{{ messages[0].content }}\n"
    assert not conversations(plain + "assistant:").prompt(Talk([user("<|channel>thought\n")])).starts_thinking
    chat = Conversations(tokenizer(TAGS), PLAIN)
    assert not chat.prompt(Talk(TALK, thinking=True)).starts_thinking


def test_markers_without_ids_are_found_in_the_text() -> None:
    wrapper = tokenizer(TAGS)
    dialect: Dialect = find_dialect({"<think>": 1})
    unknown = tuple(type(marker)(marker.mark, marker.text, None) for marker in dialect.markers)
    chat = Conversations(wrapper, Dialect("x", markers=unknown))
    assert chat.prompt(Talk(TALK, thinking=True)).starts_thinking
    assert not chat.prompt(Talk(TALK, thinking=False)).starts_thinking


def test_reasoning_that_was_cut_off_goes_on() -> None:
    chat = conversations()
    for said, thinks in (("<think>\nFirst", True), ("<think>\nFirst\n</think>\nThen", False), ("Then", False)):
        assert chat.prompt(Talk([user("a"), answer(said)], continue_last=True)).starts_thinking == thinks


# marks


def _cuts(prompt_marks: tuple[int, ...], ids: list[int], template: str = TAGS) -> list[str]:
    return [_text(ids[:mark], template) for mark in prompt_marks]


def test_marks_are_where_other_conversations_may_turn_off() -> None:
    prompt = conversations().prompt(Talk(TALK, [WEATHER]))
    head, last, end = _cuts(prompt.marks, prompt.ids)
    assert head.endswith("Be brief.<|im_end|>\n<|im_start|>") and head.count("<|im_start|>") == 2
    assert last.endswith("hello<|im_end|>\n<|im_start|>") and last.count("<|im_start|>") == 4
    assert end.endswith("the answer?<|im_end|>\n")
    assert all(0 < mark < len(prompt.ids) for mark in prompt.marks)


def test_within_a_loop_of_calls_the_end_of_the_question_is_a_mark() -> None:
    called = answer("", reasoning_content="because", tool_calls=[call('{"city": "Paris"}')])
    messages = [user("weather?"), called, result("sunny")]
    prompt = conversations().prompt(Talk(messages))
    question, end = _cuts(prompt.marks, prompt.ids)
    assert question.endswith("weather?<|im_end|>\n") and end.endswith("</tool_response><|im_end|>\n")
    later = conversations().prompt(Talk([*messages, answer("Sunny."), user("thanks")]))
    assert later.ids[: prompt.marks[0]] == prompt.ids[: prompt.marks[0]]


@pytest.mark.parametrize("template", [TAGS, BRACES, FIELDS])
def test_a_turn_more_has_the_marks_of_its_beginning_in_common(template: str) -> None:
    chat = conversations(template)
    now = chat.prompt(Talk(TALK))
    after = chat.prompt(Talk([*TALK, answer("hello world"), user("and?")]))
    assert now.ids[: now.marks[-1]] == after.ids[: now.marks[-1]]
    other = chat.prompt(Talk([*TALK[:1], user("something else")]))
    assert now.ids[: now.marks[0]] == other.ids[: now.marks[0]]


def test_a_prompt_costs_few_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = conversations()
    chat.prompt(Talk(TALK))
    count, render = 0, Template.render

    def counted(*given: Any, **more: Any) -> str:
        nonlocal count
        count += 1
        return render(*given, **more)

    monkeypatch.setattr(Template, "render", counted)
    chat.prompt(Talk(TALK, [WEATHER]))
    assert count == 4


# replay


def _loosely(template: str, text: str) -> list[int]:
    """A reply tokenised as no tokenizer would: markers as they are, all else letter by letter."""
    wrapper = tokenizer(template)
    added = {token.content for token in wrapper.added_tokens_decoder.values()}
    ids: list[int] = []
    while text:
        piece = next((marker for marker in added if text.startswith(marker)), text[0])
        ids += wrapper.encode(piece, add_special_tokens=False)
        text = text[len(piece) :]
    return ids


def _heard(template: str, ids: list[int], starts_thinking: bool) -> dict[str, Any]:
    """The message that a client makes of a reply, and sends back."""
    wrapper, content, reasoning, name, arguments = tokenizer(template), "", "", "", ""
    dialect = find_dialect(wrapper.get_vocab())
    parser = Parser(dialect, tools={"weather": CITY}, starts_thinking=starts_thinking)
    events: list[Event] = [event for token in ids for event in parser.feed(token, _text([token], template))]
    for event in [*events, *parser.finish("stop")]:
        match event:
            case Content():
                content += event.text
            case Reasoning():
                reasoning += event.text
            case ToolCallStart():
                name = event.name
            case ToolCallArguments():
                arguments += event.fragment
    return answer(content or None, reasoning_content=reasoning, tool_calls=[call(arguments, name)] if name else None)


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


CALLS = {
    TAGS: (
        "I call.\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
        "</tool_call><|im_end|>"
    ),
    BRACES: (
        '<|channel>thought\nI call.\n<channel|><|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'
        "<|tool_response>"
    ),
}
ANSWERS = {TAGS: "I know.\n</think>\n\nhello  world<|im_end|>", BRACES: "hello  world<turn|>"}


@pytest.mark.parametrize("template", [TAGS, BRACES], ids=["tags", "braces"])
def test_a_loop_of_calls_goes_on_with_the_ids_that_were_generated(template: str) -> None:
    chat, messages = conversations(template), [system("Be brief."), user("weather in Paris?")]
    for turn in range(3):
        prompt = chat.prompt(Talk(messages, [WEATHER], thinking=True))
        reply = _loosely(template, CALLS[template])
        before = [*prompt.ids, *reply]
        assert before != chat.encode(_text(before, template), special=False)
        chat.remember(before)
        messages += [_heard(template, reply[:-1], prompt.starts_thinking), result(f"sunny {turn}")]
        after = chat.prompt(Talk(messages, [WEATHER], thinking=True))
        assert _shared(before, after.ids) == len(before)
        # Without memory, only up to the first word that is split otherwise.
        assert _shared(before, conversations(template).prompt(Talk(messages, [WEATHER], thinking=True)).ids) < len(
            before
        )


@pytest.mark.parametrize("template", [TAGS, BRACES], ids=["tags", "braces"])
def test_after_the_loop_what_was_shown_before_the_thoughts_is_shared(template: str) -> None:
    chat, messages = conversations(template), [system("Be brief."), user("weather in Paris?")]
    first = chat.prompt(Talk(messages, [WEATHER], thinking=True))
    seen = first.ids
    for reply_text in (CALLS[template], ANSWERS[template]):
        prompt = chat.prompt(Talk(messages, [WEATHER], thinking=True))
        reply = _loosely(template, reply_text)
        seen = [*prompt.ids, *reply]
        chat.remember(seen)
        messages += [_heard(template, reply[:-1], prompt.starts_thinking)]
        messages += [result("sunny")] if messages[-1]["tool_calls"] else [user("thanks")]
    after = chat.prompt(Talk(messages, [WEATHER], thinking=True))
    # The thoughts are dropped: all is the same up to where they began.
    opened = len(_loosely(template, "<think>\n")) if template == TAGS else 0
    assert _shared(seen, after.ids) == len(first.ids) - opened
    again = chat.prompt(Talk([*messages[:-1], user("other")], [WEATHER], thinking=True))
    assert _shared(after.ids, again.ids) >= max(mark for mark in after.marks[:-1])


def test_an_answer_without_thoughts_is_shared_with_the_next_turn() -> None:
    for template, reply_text in ((BRACES, "hello  world<turn|>"), (FIELDS, "hello  world<|im_end|>")):
        chat, messages = conversations(template), [user("hello")]
        for _ in range(3):
            prompt = chat.prompt(Talk(messages))
            reply = _loosely(template, reply_text)
            chat.remember([*prompt.ids, *reply])
            messages += [_heard(template, reply[:-1], False), user("and?")]
            assert _shared([*prompt.ids, *reply], chat.prompt(Talk(messages)).ids) == len(prompt.ids) + len(reply)


def test_one_conversation_does_not_change_the_ids_of_another() -> None:
    chat = conversations(BRACES)
    other = chat.prompt(Talk([user("weather?"), answer("hello  world"), user("and?")])).ids
    prompt = chat.prompt(Talk([user("hello")]))
    chat.remember([*prompt.ids, *_loosely(BRACES, "hello  world<turn|>")])
    assert chat.prompt(Talk([user("weather?"), answer("hello  world"), user("and?")])).ids == other


def test_a_reply_cut_at_its_limit_is_continued_with_its_ids() -> None:
    chat = conversations(BRACES)
    prompt = chat.prompt(Talk([user("hello")]))
    before = [*prompt.ids, *_loosely(BRACES, "hello wor")]
    chat.remember(before)
    assert chat.prompt(Talk([user("hello"), answer("hello wor")], continue_last=True)).ids == before


def test_many_threads_may_ask() -> None:
    chat, failed = conversations(), list[str]()

    def talk(number: int) -> None:
        for turn in range(10):
            messages = [user(f"hello {number} {turn}")]
            prompt = chat.prompt(Talk(messages, [WEATHER]))
            if _text(prompt.ids) != chat.text(Talk(messages, [WEATHER])):
                failed.append(f"{number} {turn}")
            chat.remember([*prompt.ids, *_loosely(TAGS, "hello world")])

    threads = [Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
