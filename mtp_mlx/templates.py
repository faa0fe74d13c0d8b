"""A model's chat template: what it takes, told by rendering small conversations once, and messages made to fit that."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.declarations import plain_tool
from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.messages import Message

# A template is a program; these are the ways in which one fails over what it is given.
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Traits:
    """What a template takes.

    `calls` says in which form it wants the arguments of calls. `results` says whether a tool's result is a message of
    its own ("message") or belongs to the one that called ("field"). `spells` means that it writes the schemas of tools
    word by word and not as JSON.
    """

    system: bool
    late_system: bool
    users_in_a_row: bool
    tools: bool
    spells: bool
    calls: Literal["object", "text", "none"]
    results: Literal["message", "field", "none"]
    thinking: bool


class Template:
    """Renders messages. Raises RequestError for what the template refuses, CheckpointError if it refuses everything."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer

    @cached_property
    def traits(self) -> Traits:
        """What the template takes."""
        if self._failure is not None:
            raise CheckpointError(
                f"the model's chat template fails ({_line(self._failure)}); mend it, or have plain text continued "
                "(--ignore-chat-template)"
            )
        calls = self._calls()
        return Traits(
            system=_in_order(self._tried([_say("system", _A), _say("user", _B)]), _A, _B),
            late_system=_in_order(self._tried([*_EXCHANGE, _say("system", _A), _say("user", _B)]), "first", _A, _B),
            users_in_a_row=_in_order(self._tried([_say("user", _A), _say("user", _B)]), _A, _B),
            tools=_A in self._tried(_QUESTION, [_TOOL]),
            spells=_B not in self._tried(_QUESTION, [_TOOL]),
            calls=calls,
            results=self._results(calls),
            thinking=self._tried(_QUESTION, enable_thinking=True) != self._tried(_QUESTION, enable_thinking=False),
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        *,
        asks: bool = True,
    ) -> str:
        """The text of messages that fit the template; up to where the model is to answer if it `asks`."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=asks,
                tokenize=False,
                **(options or {}),
            )
        except _FAILURES as error:
            raise RequestError(f"the model's chat template refuses this conversation: {_line(error)}") from error
        return text

    def fitted(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the template takes them; system messages at the beginning become one."""
        fitted: list[Message] = []
        for message in _joined_head(messages):
            self._place(message, fitted)
        if any("tool_calls" in message for message in fitted):
            return self._with_calls(fitted)
        return fitted

    def _place(self, message: Message, before: list[Message]) -> None:
        """Append a message; what was said in between by the system, or by the user twice, in a way that is taken."""
        taken = self.traits.late_system if before else self.traits.system
        if message["role"] == "system" and not taken:
            message = _say("user", f"<system>\n{message['content']}\n</system>")
        again = before and message["role"] == before[-1]["role"] == "user"
        if again and not self.traits.users_in_a_row:
            message = _say("user", f"{before.pop()['content']}\n\n{message['content']}")
        before.append(message)

    def fitted_tools(self, tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Tools as the template takes them."""
        if tools and not self.traits.tools:
            raise RequestError("the model's chat template has no place for tools; leave them out or use another model")
        return [plain_tool(tool) if self.traits.spells else tool for tool in tools]

    def _with_calls(self, messages: Sequence[Message]) -> list[Message]:
        calls, results = self.traits.calls, self.traits.results
        has_results = any(message["role"] == "tool" for message in messages)
        if calls == "none" or (results == "none" and has_results):
            raise RequestError("the model's chat template has no place for calls of tools; use another model")
        if calls == "text":
            messages = [_with_text_arguments(message) for message in messages]
        return _with_results_inside(messages) if results == "field" else list(messages)

    @cached_property
    def _failure(self) -> Exception | None:
        """Why the simplest of all conversations cannot be rendered, if so."""
        try:
            self._tokenizer.apply_chat_template(_QUESTION, add_generation_prompt=True, tokenize=False)
        except _FAILURES as error:
            return error
        return None

    def _calls(self) -> Literal["object", "text", "none"]:
        """An object is tried first: templates that write JSON would quote a text once more."""
        if _A in self._tried(_called()):
            return "object"
        return "text" if _A in self._tried([_with_text_arguments(message) for message in _called()]) else "none"

    def _results(self, calls: str) -> Literal["message", "field", "none"]:
        form: Callable[[Message], Message] = _with_text_arguments if calls == "text" else dict
        messages = [form(message) for message in [*_called(), _RESULT]]
        # The field first: a template that knows it may render any role whatever, as a turn of its own.
        if _B in self._tried(_with_results_inside(messages)):
            return "field"
        return "message" if _B in self._tried(messages) else "none"

    def _tried(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **options: Any) -> str:
        """What the template makes of messages; nothing where it refuses them."""
        try:
            return self.render(messages, tools, options)
        except RequestError:
            return ""


def _say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# Words that no template holds.
_A, _B = "qzvfirst", "qzvsecond"
_QUESTION = [_say("user", "question")]
_EXCHANGE = [_say("user", "first"), _say("assistant", "answer")]
_TOOL = {
    "type": "function",
    "function": {
        "name": _A,
        "description": "probe",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "", "x": _B}}},
    },
}
_RESULT: Message = {"role": "tool", "tool_call_id": "call_1", "name": "probe", "content": _B}


def _called() -> list[Message]:
    call = {"id": "call_1", "type": "function", "function": {"name": "probe", "arguments": {"key": _A}}}
    return [*_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _joined_head(messages: Sequence[Message]) -> list[Message]:
    """Messages with all system messages at the beginning in one."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return list(messages)
    return [_say("system", "\n\n".join(message["content"] for message in messages[:count])), *messages[count:]]


def _with_text_arguments(message: Message) -> Message:
    """A message whose calls hold their arguments as JSON."""
    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": [_with_text(call) for call in message["tool_calls"]]}


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _with_results_inside(messages: Sequence[Message]) -> list[Message]:
    """Messages with the results of tools in the messages that called them."""
    inside: list[Message] = []
    for message in messages:
        caller = inside[-1] if inside else {}
        if message["role"] == "tool" and "tool_calls" in caller:
            response = {"name": message["name"], "response": message["content"]}
            inside[-1] = caller | {"tool_responses": [*caller.get("tool_responses", []), response]}
        else:
            inside.append(message)
    return inside


def _in_order(text: str, *words: str) -> bool:
    """Whether a text holds these words one after the other."""
    places = [text.find(word) for word in words]
    return -1 not in places and places == sorted(places)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
