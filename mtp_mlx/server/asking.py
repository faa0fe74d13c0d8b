"""A request's body -> what the engine is asked, and how its answer is to be read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mtp_mlx.conversation import Prompt, Talk
from mtp_mlx.engine import Request
from mtp_mlx.grammar import Grammar
from mtp_mlx.marks import Mark
from mtp_mlx.options import Options
from mtp_mlx.penalties import Penalties
from mtp_mlx.prompts import check_text
from mtp_mlx.sampling import Sampler, choose_sampler
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.refusal import RefusedError, too_long
from mtp_mlx.server.service import Service
from mtp_mlx.server.wire import (
    ChatRequest,
    ChatTemplating,
    ChosenTool,
    CompletionRequest,
    Generation,
    InfillRequest,
    PlainFormat,
    Sampling,
    SchemaFormat,
    TextPart,
    Tool,
)
from mtp_mlx.tool_calls import Tools

PENALTY_CONTEXT = 64  # tokens that penalties look back, as in llama.cpp
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Voice:
    """How a reply is read: raw, or as a chat model's with reasoning and calls."""

    chat: bool = False
    tools: Tools = field(default_factory=dict)
    starts_thinking: bool = False
    one_call: bool = False  # the reply ends with its first call


@dataclass(frozen=True)
class Task:
    """What is asked of the engine: `copies` texts after each prompt."""

    requests: tuple[Request, ...]
    voice: Voice = field(default_factory=Voice)
    copies: int = 1
    predicted: bool = False  # the client gave text that it expects
    seconds: float | None = None  # that writing may take
    silent: bool = False  # the prompt is read and nothing said


class Asking:
    """Reads bodies for one service. May take a while: templates are rendered and grammars compiled."""

    def __init__(self, service: Service, limits: Limits):
        self._service, self._limits = service, limits

    def chat(self, body: ChatRequest) -> Task:
        """Raises RefusedError, or RequestError, for what cannot be served."""
        self._service.check_name(body.model)
        tools = self._offered(body)
        prompt = self._prompt(body, tools)
        options = self._options(body, len(prompt.ids), body.max_completion_tokens or body.max_tokens)
        options = replace(
            options,
            grammar=self._chat_grammar(body, tools),
            thinking=prompt.starts_thinking,
            stops=self._service.dialect.stops,
            frees=self._openers(body, tools),
        )
        asked = Request(
            prompt.ids, options, body.stops, prompt.marks, body.top_logprobs or 0 if body.logprobs else None
        )
        voice = Voice(
            chat=True,
            tools=_schemas(tools),
            starts_thinking=prompt.starts_thinking,
            one_call=body.parallel_tool_calls is False,
        )
        return self._copied([asked], body, voice)

    def template(self, body: ChatTemplating) -> str:
        """The rendered text of a conversation."""
        return self._service.conversations.text(self._talk(body, body.tools or []))

    def completion(self, body: CompletionRequest) -> Task:
        """Raises RefusedError, or RequestError, for what cannot be served."""
        self._service.check_name(body.model)
        grammar = self._guided(body)
        asked = []
        for ids, stops in self._raw_prompts(body):
            options = replace(self._options(body, len(ids), body.max_tokens), grammar=grammar, stops=stops)
            asked.append(Request(ids, options, body.stops, top_logprobs=body.logprobs))
        return self._copied(asked, body, Voice())

    def infill(self, body: InfillRequest) -> Task:
        """Raises RefusedError, or RequestError, for what cannot be served."""
        self._service.check_name(body.model)
        extra = [(file.filename or "", file.text) for file in body.input_extra or ()]
        ids, stops = self._between(body.input_prefix, body.input_suffix, extra)
        ids += self._encode(body.prompt, special=False) if body.prompt else []
        wanted = None if body.n_predict in (-1, 0) else body.n_predict
        options = replace(self._options(body, len(ids), wanted), stops=stops)
        if body.n_predict == 0:
            options = replace(options, max_tokens=1)
        limit = None if body.t_max_predict_ms is None else body.t_max_predict_ms / 1e3
        return Task((Request(ids, options, body.stops),), seconds=limit or None, silent=body.n_predict == 0)

    def _prompt(self, body: ChatRequest, tools: list[Tool]) -> Prompt:
        return self._service.conversations.prompt(self._talk(body, tools))

    def _talk(self, body: ChatTemplating, tools: list[Tool]) -> Talk:
        return Talk(
            [message.model_dump(exclude_none=True) for message in body.messages],
            [tool.model_dump(exclude_none=True) for tool in tools],
            thinking=self._service.defaults.thinking,
            effort=body.reasoning_effort,
            template_options=body.chat_template_kwargs or {},
            continue_last=bool(body.continue_final_message),
        )

    def _offered(self, body: ChatRequest) -> list[Tool]:
        """The tools that the model is told of: the chosen one, where one was chosen."""
        tools, choice = body.tools or [], body.tool_choice
        if len(tools) > self._limits.tools or len(body.model_dump_json(include={"tools"})) > self._limits.tools_size:
            raise RefusedError(
                400,
                f"{len(tools)} tools are too many or too large; at most {self._limits.tools} tools "
                f"of {self._limits.tools_size} bytes are taken",
                param="tools",
            )
        if choice in ("required",) and not tools:
            raise RefusedError(
                400, "tool_choice asks for a call and there are no tools; give some", param="tool_choice"
            )
        if not isinstance(choice, ChosenTool):
            return [] if choice == "none" else tools
        chosen = [tool for tool in tools if tool.function.name == choice.function.name]
        if not chosen:
            raise RefusedError(
                400, f"tool_choice names {choice.function.name[:80]!r}, which is no tool", param="tool_choice"
            )
        return chosen

    def _chat_grammar(self, body: ChatRequest, tools: list[Tool]) -> Grammar | None:
        guided, wanted = self._guided(body), body.response_format
        shaped = wanted is not None and wanted.type != "text"
        if isinstance(body.tool_choice, ChosenTool) or body.tool_choice == "required":
            if guided or shaped:
                raise RefusedError(
                    400, "a call is asked for and a format of text too; give one of them", param="tool_choice"
                )
            return Grammar.tool_calls(self._service.guide, self._service.dialect, _schemas(tools))
        if guided and shaped:
            raise RefusedError(400, "two formats are asked for; give one of them", param="response_format")
        if isinstance(wanted, SchemaFormat):
            return self._schema(wanted.json_schema.schema_, "response_format")
        if isinstance(wanted, PlainFormat) and shaped:
            return Grammar.json_object(self._service.guide)
        return guided

    def _openers(self, body: ChatRequest, tools: list[Tool]) -> frozenset[int]:
        """Markers with which an answer may turn into a call instead of what a grammar asks for."""
        if not tools or isinstance(body.tool_choice, ChosenTool) or body.tool_choice == "required":
            return frozenset()
        markers = self._service.dialect.markers
        return frozenset(marker.id for marker in markers if marker.mark is Mark.CALL_OPEN and marker.id is not None)

    def _guided(self, body: Generation) -> Grammar | None:
        given = [name for name in ("guided_json", "guided_regex", "guided_grammar") if name in body.model_fields_set]
        if len(given) > 1:
            raise RefusedError(400, f"{' and '.join(given)} are asked for; give one of them", param=given[1])
        if body.guided_json is not None:
            return self._schema(body.guided_json, "guided_json")
        if body.guided_regex is not None:
            return Grammar.regex(self._service.guide, self._sized(body.guided_regex, "guided_regex"))
        if body.guided_grammar is not None:
            return Grammar.lark(self._service.guide, self._sized(body.guided_grammar, "guided_grammar"))
        return None

    def _schema(self, schema: Mapping[str, Any], param: str) -> Grammar:
        self._sized(json.dumps(schema), param)
        return Grammar.json_schema(self._service.guide, schema)

    def _sized(self, text: str, param: str) -> str:
        if len(text.encode()) > self._limits.schema:
            raise RefusedError(400, f"{param} is larger than {self._limits.schema} bytes; shorten it", param=param)
        return text

    def _raw_prompts(self, body: CompletionRequest) -> list[tuple[list[int], frozenset[int]]]:
        """Token ids and stops of each prompt."""
        if body.suffix is not None:
            assert isinstance(body.prompt, str), "checked with the body"
            return [self._between(body.prompt, body.suffix)]
        return [(ids, frozenset[int]()) for ids in map(self._ids, _prompts(body.prompt))]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self._encode(prompt) if isinstance(prompt, str) else prompt

    def _between(
        self, prefix: str, suffix: str, extra: list[tuple[str, str]] | None = None
    ) -> tuple[list[int], frozenset[int]]:
        """Token ids of a text with a gap, and what ends its filling."""
        infill = self._service.infill
        if infill is None:
            raise RefusedError(
                400,
                f"{self._service.name} has no tokens for filling in the middle of a text; leave the suffix out",
                param="suffix",
                code="no_infill",
            )
        for text in (prefix, suffix, *(part for file in extra or () for part in file)):
            check_text(text)
        return infill.prompt(self._service.tokenizer, prefix, suffix, extra or ()), infill.stops

    def _encode(self, text: str, special: bool = True) -> list[int]:
        check_text(text)
        return self._service.conversations.encode(text, special=special)

    def _options(self, body: Sampling, prompt: int, wanted: int | None) -> Options:
        room = self._service.context - prompt
        if room < 1:
            raise too_long(prompt, self._service.context)
        prediction = body.prediction if isinstance(body, Generation) else None
        return Options(
            max_tokens=self._budget(wanted, room),
            depth=self._service.defaults.depth if body.depth is None else body.depth,
            sampler=self._sampler(body),
            penalties=self._penalties(body),
            seed=None if body.seed is None else _folded(body.seed),
            prediction=_joined(prediction.content) if prediction else None,
        )

    def _budget(self, wanted: int | None, room: int) -> int:
        """How many tokens are written at most; -1 lets memory decide too."""
        most = self._service.defaults.max_tokens if wanted is None else wanted
        if most != -1:
            return min(most, room)
        return -1 if self._service.context == self._service.trained_context else room

    def _sampler(self, body: Sampling) -> Sampler:
        defaults = self._service.defaults
        return choose_sampler(
            defaults.temperature if body.temperature is None else body.temperature,
            defaults.top_p if body.top_p is None else body.top_p,
            defaults.min_p if body.min_p is None else body.min_p,
            defaults.top_k if body.top_k is None else body.top_k,
        )

    def _penalties(self, body: Sampling) -> Penalties:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        beyond = [token for token in bias if token >= self._service.vocabulary]
        if beyond:
            message = f"token {beyond[0]} is not in the vocabulary; ids end at {self._service.vocabulary - 1}"
            raise RefusedError(400, message, param="logit_bias")
        reach = body.repeat_last_n or PENALTY_CONTEXT
        repetition = body.repeat_penalty
        if isinstance(body, Generation) and repetition is None:
            repetition = body.repetition_penalty
        return Penalties(
            repetition=1.0 if repetition is None else repetition,
            repetition_context=reach,
            presence=body.presence_penalty or 0.0,
            presence_context=reach,
            frequency=body.frequency_penalty or 0.0,
            frequency_context=reach,
            bias=tuple(sorted(bias.items())),
        )

    def _copied(self, asked: list[Request], body: Generation, voice: Voice) -> Task:
        """The same again for `n` choices; each has a seed of its own."""
        copies = body.n or 1
        if copies * len(asked) > self._limits.choices:
            raise RefusedError(
                400,
                f"{copies} choices for {len(asked)} prompts are more texts than {self._limits.choices}; ask for fewer",
                param="n",
            )
        requests = tuple(_reseeded(request, i) for request in asked for i in range(copies))
        return Task(requests, voice, copies, predicted=body.prediction is not None)


def _schemas(tools: list[Tool]) -> Tools:
    return {tool.function.name: tool.function.parameters or {} for tool in tools}


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Each prompt by itself."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [token for token in prompt if isinstance(token, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]


def _joined(content: str | list[TextPart]) -> str:
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    check_text(text)
    return text


def _folded(seed: int) -> int:
    """One word of a seed of any size and sign; a seed that is one word is that word."""
    return (seed ^ (seed >> 32)) & WORD


def _reseeded(request: Request, number: int) -> Request:
    seed = request.options.seed
    if seed is None or number == 0:
        return request
    return replace(request, options=replace(request.options, seed=(seed + number) & WORD))
