"""A conversation -> the token ids that a model is shown, and what is known of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.dialects import Dialect, find_dialect
from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.marks import Mark
from mtp_mlx.messages import Message, read_messages, read_tools
from mtp_mlx.prompts import check_text, lacks_special
from mtp_mlx.replay import Encoded, Replay
from mtp_mlx.templates import Template

# How much a model is to reason -> whether at all.
EFFORTS = {"none": False, "minimal": True, "low": True, "medium": True, "high": True, "xhigh": True, "max": True}

# What a template's options may not be named: arguments of the rendering, and functions that templates call.
_RESERVED = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length"),
    *("messages", "padding", "raise_exception", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
    *("sanitize_control_tokens", "self", "strftime_now", "tojson", "tokenize", "tokenizer_kwargs", "tools"),
    "truncation",
}
_HERE = "qzvhere"  # a word that marks the end of a message which is to go on


@dataclass(frozen=True)
class Prompt:
    """What a model is shown.

    `marks` are numbers of tokens after which other prompts are expected to differ. `starts_thinking` says whether the
    prompt ends within a block of reasoning.
    """

    ids: list[int]
    marks: tuple[int, ...]
    starts_thinking: bool


@dataclass(frozen=True)
class Talk:
    """Messages and tools in the shape of OpenAI's chat completions, and how a model is to answer them.

    `thinking` and `effort` say whether and how much to reason; a template that has no switch for it decides by
    itself. `template_options` are handed to the template. With `continue_last` the model goes on with the last
    message, which must be the assistant's, where it stops.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool | None = None
    effort: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    continue_last: bool = False


@dataclass(frozen=True)
class _Fitted:
    """What a template is given. `other` begins as the messages do, up to where the system has spoken."""

    messages: list[Message]
    other: list[Message]
    tools: list[Mapping[str, Any]]
    options: Mapping[str, Any]
    continued: bool


class Conversations:
    """A tokenizer and its chat template. Several threads may use it."""

    def __init__(self, tokenizer: TokenizerWrapper, dialect: Dialect) -> None:
        self.has_template: bool = tokenizer.has_chat_template
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._template = Template(tokenizer)
        self._replay = Replay(tokenizer)

    def check_switch(self, thinking: bool | None) -> None:
        """Raises RequestError where thinking is to be switched on or off and the template decides that by itself."""
        if thinking is not None and not (self.has_template and self._template.traits.thinking):
            raise RequestError("the model's chat template has no switch for thinking; leave --think and --no-think out")

    def prompt(self, talk: Talk) -> Prompt:
        """The prompt for the answer.

        Raises RequestError for messages that cannot be rendered, CheckpointError if the model has no chat template.
        """
        fitted = self._fitted(talk)
        text = self._rendered(fitted)
        encoded = self._replay.encode(text)
        marks = tuple(sorted(set(self._marks(fitted, text, encoded))))
        return Prompt(encoded.ids, marks, self._starts_thinking(fitted, text, encoded.ids))

    def text(self, talk: Talk) -> str:
        """The text of which `prompt` gives the ids."""
        return self._rendered(self._fitted(talk))

    def remember(self, ids: list[int]) -> None:
        """Let prompts that begin with the text of these ids, a prompt and its answer, begin with these very ids."""
        self._replay.remember(ids)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text that is no conversation. Special tokens are added unless it begins with BOS, or not."""
        check_text(text)
        return self._replay.encode(text, special and lacks_special(self._tokenizer, text)).ids if text else []

    def _fitted(self, talk: Talk) -> _Fitted:
        if not self.has_template:
            raise CheckpointError("the model has no chat template, so it cannot chat; give it text to continue instead")
        read = read_messages(talk.messages)
        if talk.continue_last:
            _check_continued(read[-1])
        options = _options(talk.thinking, talk.effort, talk.template_options)
        told = self._template.fitted_tools(read_tools(talk.tools))
        head = list(takewhile(lambda message: message["role"] == "system", read))
        other = self._template.fitted([*head, _other(read, len(head))]) if head or told else []
        return _Fitted(self._template.fitted(read), other, told, options, talk.continue_last)

    def _rendered(self, talk: _Fitted) -> str:
        if not talk.continued:
            return self._template.render(talk.messages, talk.tools, talk.options)
        *earlier, last = talk.messages
        # Past the mark the template closes the turn; before it, it may have nothing to strip.
        last = last | {"content": last["content"] + _HERE}
        before, found, _ = self._template.render([*earlier, last], talk.tools, talk.options, asks=False).rpartition(
            _HERE
        )
        if not found:
            raise RequestError("the model's chat template drops the last message, so it cannot be continued")
        return before

    def _marks(self, talk: _Fitted, text: str, encoded: Encoded) -> Iterator[int]:
        for place in self._turning_points(talk, text):
            ends = (side for border in encoded.borders for side in _sides(border.at, border.start, border.end))
            mark = max((count for count, at in ends if at <= place), default=0)
            if 0 < mark < len(encoded.ids):
                yield mark

    def _turning_points(self, talk: _Fitted, text: str) -> Iterator[int]:
        """Where in a text other conversations may take another turn: after system text and tools, before and after
        the last message of a user, and after the last message of all."""
        messages = talk.messages
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        others = [(talk.other, True)] if talk.other else []
        if len(users) > 1:
            others.append(([*messages[: users[-1]], _other(messages, users[-1])], True))
        if users and users[-1] < len(messages) - 1:
            others.append((messages[: users[-1] + 1], False))
        others.append((messages, False))
        for other, asks in others:
            try:
                yield _shared(text, self._template.render(other, talk.tools, talk.options, asks=asks))
            except RequestError:
                continue  # a template may refuse a part of what it takes as a whole

    def _starts_thinking(self, talk: _Fitted, text: str, ids: list[int]) -> bool:
        opening = next((marker for marker in self._dialect.markers if marker.mark is Mark.THINK_OPEN), None)
        closing = next((marker for marker in self._dialect.markers if marker.mark is Mark.THINK_CLOSE), None)
        if opening is None or closing is None:
            return False
        if talk.continued and opening.text in (said := talk.messages[-1]["content"]):
            return closing.text not in said.rpartition(opening.text)[2]
        if opening.id is None:
            rest = text.rpartition(opening.text)[2] if opening.text in text else text
        elif opening.id in ids:
            after = ids[len(ids) - ids[::-1].index(opening.id) :]
            rest = self._tokenizer.decode(after, skip_special_tokens=False)
        else:
            return False
        return rest.strip() in ("", self._dialect.title.strip())


def in_chat_template(tokenizer: TokenizerWrapper, prompt: str) -> str | list[int]:
    """A prompt as a chat model expects a user's turn; as it is, if the model has no chat template.

    Raises CheckpointError for a template that fails.
    """
    if not tokenizer.has_chat_template or not prompt:
        return prompt
    conversations = Conversations(tokenizer, find_dialect(tokenizer.get_vocab()))
    return conversations.prompt(Talk([{"role": "user", "content": prompt}])).ids


def _options(thinking: bool | None, effort: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a template, by the names that both families' templates use."""
    options = _checked_options(given)
    if effort is not None and effort not in EFFORTS:
        raise RequestError(f"reasoning effort is {effort!r}; use one of {', '.join(EFFORTS)}")
    if effort is not None and EFFORTS[effort]:
        options.setdefault("reasoning_effort", effort)
    if thinking is None and effort is not None:
        thinking = EFFORTS[effort]
    if thinking is not None and options.setdefault("enable_thinking", thinking) is not thinking:
        raise RequestError(
            f"the template's option enable_thinking is {options['enable_thinking']!r}, but reasoning is switched "
            f"{'on' if thinking else 'off'} by the request; give one of the two"
        )
    return options


def _checked_options(given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"the template's options are {given!r}; give an object of names and values")
    for name, value in given.items():
        if not isinstance(name, str) or name in _RESERVED or name.endswith("_token"):
            raise RequestError(f"the template's option {name!r} cannot be set; leave it out")
        if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
            raise RequestError(f"the template's option {name} is {value!r}; give a text, a number, true, false or null")
        if isinstance(value, str):
            check_text(value, f"template's option {name}")
    return dict(given)


def _check_continued(last: Message) -> None:
    if last["role"] != "assistant":
        raise RequestError(f"the last message is of role {last['role']}; only the assistant's can be continued")
    if "tool_calls" in last:
        raise RequestError("the last message calls tools, so it cannot be continued; give the results of its calls")


def _other(messages: Sequence[Message], i: int) -> Message:
    """A user's message that differs from the i-th message from its first character on."""
    content = messages[i]["content"] if i < len(messages) else ""
    return {"role": "user", "content": "y" if content.lstrip().startswith("x") else "x"}


def _sides(index: int, start: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Numbers of tokens before and after an added token, and where the text is cut there."""
    return (index, start), (index + 1, end)


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common from the beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
