"""A server over a tiny model whose every word is given: real tokens, markers included, through the real engine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from conftest import FIXTURES
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from replies import tokenizer
from starlette.testclient import TestClient

from mtp_mlx.engine import Engine, Request, Stream
from mtp_mlx.loading import Loaded, load_pair
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.sampling import Greedy
from mtp_mlx.server.app import make_app
from mtp_mlx.server.guard import Access
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.service import Defaults, Service

MARKERS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
GAPS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
END = "<|im_end|>"
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
USER = [{"role": "user", "content": "Hello?"}]


@dataclass(frozen=True, eq=False)
class Says(Greedy):
    """A sampler that writes a given sequence, by absolute position."""

    tokens: mx.array  # (T,)

    # Not as Greedy, of which all are alike: a step is traced for each.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __call__(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        return self.tokens[keys[..., 1]]

    def law(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        return mx.where(mx.arange(logprobs.shape[-1]) == self(logprobs, keys)[..., None], 0.0, -mx.inf)


class Scripted(Engine):
    """An engine whose model says what is in `script`, then ends, or goes on if it is told not to stop."""

    script: str | None = None
    seen: list[Request]

    def __init__(self, loaded: Loaded, **options: Any):
        self.seen = []
        self.streams: list[Stream] = []
        self.words = loaded.tokenizer
        super().__init__(loaded.pair, loaded.tokenizer, Prefixes(loaded.pair, 10**8, near=8), **options)

    def stream(self, request: Request) -> Stream:
        self.seen.append(request)
        self.streams.append(super().stream(self._scripted(request)))
        return self.streams[-1]

    def _scripted(self, request: Request) -> Request:
        if self.script is None:
            return request
        said = self.words.encode(self.script, add_special_tokens=False)
        end = self.words.eos_token_id
        # Drafts need a few tokens beyond the end.
        text = mx.array([0] * len(request.prompt) + said + [end] * 64, mx.int32)
        return replace(request, options=replace(request.options, sampler=Says(text), drafts="argmax"))


@cache
def tiny_loaded(infill: bool = True) -> Loaded:
    """A tiny model with a tokenizer that knows markers, and a chat template."""
    loaded = load_pair(str(FIXTURES / "qwen3_5_tied"), dtype=mx.float32)
    plain = tokenizer(*MARKERS, *(GAPS if infill else []))
    plain.eos_token = END
    plain.chat_template = TEMPLATE
    ids = {plain.convert_tokens_to_ids(END)}
    wrapped = TokenizerWrapper(plain, BPEStreamingDetokenizer, eos_token_ids=ids)
    return replace(loaded, tokenizer=wrapped, target="org/tiny")


@contextmanager
def serving(
    *,
    infill: bool = True,
    limits: Limits | None = None,
    access: Access | None = None,
    defaults: Defaults | None = None,
    context: int | None = None,
    **options: Any,
) -> Iterator[tuple[TestClient, Scripted]]:
    """A client of an application, and the engine behind it."""
    loaded = tiny_loaded(infill)
    engine = Scripted(loaded, **options)
    service = Service.of(loaded, engine, slots=4, names=("tiny",), context=context, defaults=defaults)
    app = make_app(service, limits, access or Access(hosts=frozenset({"testserver"})))
    try:
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client, engine
    finally:
        engine.close(10)


@pytest.fixture(scope="session")
def _shared() -> Iterator[tuple[TestClient, Scripted]]:
    with serving(limits=Limits(choices=8, schema=4096)) as served:
        yield served


@pytest.fixture
def served(_shared: tuple[TestClient, Scripted]) -> "Served":
    """A server for all tests; what its model says is up to each."""
    client, engine = _shared
    engine.script = None
    engine.seen.clear()
    engine.streams.clear()
    return Served(client, engine)


@dataclass(frozen=True)
class Served:
    """A client, and the engine behind its server."""

    client: TestClient
    engine: Scripted

    def post(self, path: str, **body: Any) -> Any:
        """The body of an answer that went well."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ends as it should."""
        answer = self.client.post(path, json=body | {"stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return chunks(answer.text)

    def refused(self, path: str, **body: Any) -> dict[str, Any]:
        """The error of a request that is refused with 400."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == 400, answer.text
        error: dict[str, Any] = answer.json()["error"]
        assert error.keys() >= {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        return error

    def says(self, script: str) -> "Served":
        self.engine.script = script
        return self


def chunks(text: str, done: bool = True) -> list[dict[str, Any]]:
    """What is in a stream of events."""
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    if done:
        assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]
