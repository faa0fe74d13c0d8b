"""The bodies of requests: what each may hold, and within which bounds. Null means that a field was left out.

What would change the output and is not supported is refused by name; what cannot change it is dropped.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

# Bookkeeping of other servers, which changes no output: whose request it is, where it is cached, how it is billed.
IGNORED = frozenset(
    {
        "cache_prompt",
        "client_metadata",
        "id_slot",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "return_progress",
        "safety_identifier",
        "service_tier",
        "store",
        "timings_per_token",
        "user",
    }
)

MESSAGES, STOPS, BIASES, CHOICES = 4096, 16, 1024, 8
SEED = 2**64

StopWord = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Body(BaseModel):
    """A body that holds nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if key not in IGNORED and value is not None}


class Part(BaseModel):
    """A part of a message, or anything else that clients send back with what other servers once added to it."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(Part):
    """A piece of text. Models here read nothing else."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Part):
    """Text in which another model refused something."""

    type: Literal["refusal"]
    refusal: str


class CalledFunction(Part):
    """Which function was called, and its arguments as JSON text."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str | dict[str, Any] = ""


class ToolCall(Part):
    """A call that an assistant has made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Part):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Part):
    """What a tool is called and takes."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Part):
    """The name of a function."""

    name: str


class ChosenTool(Part):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class PlainFormat(Body):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Body):
    """A JSON schema."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(Body):
    """What a stream holds besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Prediction(Body):
    """Text that the output will mostly repeat."""

    type: Literal["content"]
    content: str | list[TextPart]


class Sampling(Body):
    """How tokens are chosen. What is left out is as the server was started."""

    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repeat_last_n: Annotated[int, Field(ge=1, le=4096)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(gt=-SEED, lt=SEED)] | None = None
    stop: StopWord | Annotated[list[StopWord], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    depth: Annotated[int, Field(ge=0, lt=256)] | Literal["auto"] | None = Field(
        None, description="Tokens to draft per round; 'auto' measures, 0 is plain decoding."
    )

    @field_validator("logit_bias")
    @classmethod
    def _bounded(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if bias and len(bias) > BIASES:
            raise ValueError(f"{len(bias)} tokens are more than {BIASES}")
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ValueError(f"{token[:20]!r} is no token id")
            if not -100 <= value <= 100:
                raise ValueError(f"{value} for token {token} is not between -100 and 100")
        return bias

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Generation(Sampling):
    """What chat and completions have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_grammar: Annotated[str, Field(min_length=1)] | None = Field(None, description="In Lark's syntax.")
    prediction: Prediction | None = None
    show_drafts: bool | None = Field(None, description="Add to each chunk where its tokens came from.")

    @model_validator(mode="after")
    def _consistent(self) -> "Generation":
        if self.repeat_penalty is not None and self.repetition_penalty is not None:
            raise ValueError("repeat_penalty and repetition_penalty mean the same; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for requests with stream true")
        if self.prediction is not None and self.depth == 0:
            raise ValueError("a prediction is tried as drafts, and depth 0 allows none; leave one out")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatTemplating(Body):
    """What a chat template is given."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES)]
    tools: list[Tool] | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    @field_validator("tools")
    @classmethod
    def _distinct(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two tools are called {twice!r}")
        return tools


class TemplateRequest(ChatTemplating):
    """`POST /apply-template`."""

    model: str | None = None


class ChatRequest(ChatTemplating, Generation):
    """`POST /v1/chat/completions`."""

    max_completion_tokens: Count | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    @model_validator(mode="after")
    def _agreeing(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are for requests with logprobs true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        return self


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _agreeing(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of {self.best_of} is not served; leave it out or make it equal to n")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of an echoed prompt are not served; leave out echo or logprobs")
        if self.suffix is not None and (self.echo or not isinstance(self.prompt, str)):
            raise ValueError("with a suffix, prompt is one text and echo is left out")
        return self


class Extra(Part):
    """Another file that an infill may look at."""

    text: str
    filename: str | None = None


class InfillRequest(Sampling):
    """`POST /infill`."""

    model: str | None = None
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[list[Extra], Field(max_length=256)] | None = None
    prompt: str | None = Field(None, description="What the infill begins with.")
    n_predict: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 only reads the prompt.")
    n_cmpl: Annotated[int, Field(ge=1, le=1)] | None = None
    n_indent: Annotated[int, Field(ge=0)] | None = Field(None, description="Not kept to.")
    t_max_prompt_ms: Annotated[float, Field(ge=0)] | None = Field(None, description="Not kept to.")
    t_max_predict_ms: Annotated[float, Field(ge=0)] | None = None
    samplers: list[str] | None = Field(None, description="Filters go in one order here whatever this says.")
    response_fields: list[str] | None = Field(None, description="All fields are sent whatever this says.")


class TokenizeRequest(Body):
    """`POST /tokenize`."""

    model: str | None = None
    content: str
    add_special: bool = False
    parse_special: Literal[True] = True
    with_pieces: bool = False


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
