"""Messages and tools as OpenAI's clients send them -> what chat templates take. What cannot be served is named."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_mlx.errors import RequestError

Message = dict[str, Any]

SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool")

# Types of parts that hold text, and where.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_BILLING = "x-anthropic-billing-header"  # changes with every request, and says nothing to a model


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages with text for content, reasoning under both of its names, and calls whose arguments are values.

    A tool's message gets the name of the tool. Raises RequestError, with the message's index, for anything else than
    text and for what does not follow from the messages before.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is {_kind(messages)}; give a list of objects with a role and content")
    if not messages:
        raise RequestError("messages is empty; give at least one message")
    names: dict[str, str] = {}  # of the tools called so far, by the call's id
    read = [_message(message, f"messages[{i}]", names) for i, message in enumerate(messages)]
    kept = [message for message in read if message]
    if not kept:
        raise RequestError("messages hold nothing that a model may read; give at least one message of a user")
    return kept


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as templates take them: function, name, description, parameters. Raises RequestError for any other kind."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"tools is {_kind(tools)}; give a list of functions")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _message(message: Mapping[str, Any], where: str, names: dict[str, str]) -> Message | None:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is {_kind(message)}; give an object with a role and content")
    role = message.get("role")
    if role in SYSTEM:
        return _system(message, where)
    if role == "user":
        return {"role": "user", "content": _text(message.get("content"), f"{where}.content")}
    if role == "assistant":
        return _assistant(message, where, names)
    if role == "tool":
        return _result(message, where, names)
    hint = "give tool_calls and role tool instead" if role == "function" else f"use one of {', '.join(ROLES)}"
    raise RequestError(f"{where}.role is {role!r}; {hint}")


def _system(message: Mapping[str, Any], where: str) -> Message | None:
    text = _text(message.get("content"), f"{where}.content", without=_BILLING)
    return {"role": "system", "content": text} if text else None


def _assistant(message: Mapping[str, Any], where: str, names: dict[str, str]) -> Message:
    if message.get("function_call") is not None:
        raise RequestError(f"{where}.function_call is no longer in use; give tool_calls instead")
    read: Message = {"role": "assistant", "content": _text(message.get("content"), f"{where}.content")}
    given = [name for name in ("reasoning_content", "reasoning") if message.get(name)]
    if given:
        # Some templates read the one and some the other.
        read["reasoning_content"] = read["reasoning"] = _text(message[given[0]], f"{where}.{given[0]}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where}.tool_calls is {_kind(calls)}; give a list of calls")
    if calls:
        read["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]", names) for i, call in enumerate(calls)]
    return read


def _call(call: Any, where: str, names: dict[str, str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{where} holds no function; give an id, and a function with name and arguments")
    name, key = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.function.name is {name!r}; give the name of the function that was called")
    if not isinstance(key, str) or not key:
        raise RequestError(f"{where}.id is {key!r}; give the text by which the call's result refers to it")
    names[key] = name
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(given: Any, where: str) -> dict[str, Any]:
    """Arguments as an object. Templates cannot take a text that only looks like one."""
    if given is None or given == "":
        return {}
    try:
        value = json.loads(given, parse_constant=_refuse) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        raise RequestError(f"{where} is not JSON: {_short(given)}; give an object, written as JSON") from None
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} is {_kind(value)}; give an object, written as JSON")
    return _encodable(value)


def _encodable(value: Mapping[str, Any]) -> dict[str, Any]:
    """With ? for halves of surrogate pairs, which models write as escapes and no tokenizer takes."""
    text = json.dumps(value, ensure_ascii=False)
    found: dict[str, Any] = dict(value) if _is_text(text) else json.loads(text.encode("utf-8", "replace"))
    return found


def _is_text(given: str) -> bool:
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _result(message: Mapping[str, Any], where: str, names: dict[str, str]) -> Message:
    key = message.get("tool_call_id")
    if not isinstance(key, str) or key not in names:
        known = ", ".join(list(names)[-5:]) or "none"
        raise RequestError(
            f"{where}.tool_call_id is {key!r}, the latest calls before it are {known}; give the id of such a call"
        )
    content = _text(message.get("content"), f"{where}.content")
    return {"role": "tool", "tool_call_id": key, "name": names[key], "content": content}


def _text(content: Any, where: str, without: str = "") -> str:
    """The text of a message's content; parts that begin with `without` are left out."""
    if content is None:
        return ""
    if isinstance(content, str):
        texts = [_checked(content, where)]
    elif isinstance(content, list | tuple):
        texts = [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    else:
        raise RequestError(f"{where} is {_kind(content)}; give text, or a list of parts of type text")
    return "\n".join(text for text in texts if not (without and text.startswith(without)))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise RequestError(f"{where} has no type; give parts of type text")
    if kind not in _TEXTS:
        raise RequestError(f"{where} is of type {kind!r}, the model reads text only; give parts of type text")
    text = part.get(_TEXTS[kind])
    if not isinstance(text, str):
        raise RequestError(f"{where}.{_TEXTS[kind]} is {_kind(text)}; give text")
    return _checked(text, where)


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is not text that UTF-8 can hold ({error.reason})") from None
    return text


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise RequestError(f'{where} is no function; give {{"type": "function", "function": {{"name": ...}}}}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.function.name is {name!r}; give the function a name")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise RequestError(f"{where}.function.parameters is {_kind(parameters)}; give a JSON schema")
    told = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": told}


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    for kinds, name in ((int | float, "a number"), (str, "a text"), (Mapping, "an object"), (Sequence, "a list")):
        if isinstance(value, kinds):
            return name
    return f"of type {type(value).__name__}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
