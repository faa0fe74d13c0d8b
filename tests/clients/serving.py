"""A server for clients: real routes, templates, tokens and drafts, and a tiny model that says what a script has it say.

The model is a fixture with a wide vocabulary. Agents send tens of kilobytes before the first word, which would take a
CPU minutes to read: for them there is a model that skims.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import mlx.core as mx
from conftest import FIXTURES, AlteredTarget
from mlx_lm.tokenizer_utils import TokenizerWrapper
from replies import gemma_call, qwen_call
from served import Says
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from talks import BRACES, MARKERS, TAGS
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mtp_mlx.cache import MAX_BLOCK, Cache
from mtp_mlx.engine import Engine, Request, Stream
from mtp_mlx.hub import DEMO
from mtp_mlx.loading import Loaded, load_pair
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.programs import Programs
from mtp_mlx.server.app import make_app
from mtp_mlx.server.guard import Access
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.run import Server, listen
from mtp_mlx.server.service import Service
from mtp_mlx.types import Output, Pair, Span

ROOT = Path(__file__).parent.parent.parent
VOCABULARY = 8192
CONTEXT = 2**18
CACHE = 2**29  # bytes of prompts
NAME = "scripted"
Family = Literal["qwen", "gemma"]
FAMILIES: tuple[Family, ...] = ("qwen", "gemma")
# Of the markers of both.
QWENS = {f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response") for slash in ("", "/")}
QWENS |= {"<|im_start|>", "<|im_end|>"}
Body = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What the model writes: a thought, a text, calls of tools by name and arguments."""

    text: str = ""
    thought: str = ""
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    shaped: bool = False  # a grammar holds as soon as the thought ends, so that no white space comes first

    def written(self, family: Family) -> str:
        """As the family marks it up. Qwen's template opens the thought in the prompt."""
        one = qwen_call if family == "qwen" else gemma_call
        calls = ["".join(text for _, text in one(name, arguments)) for name, arguments in self.calls]
        if family == "qwen":
            gap = "" if self.shaped else "\n\n"
            return f"{self.thought}\n</think>{gap}" + "\n".join(filter(None, [self.text, *calls]))
        thought = f"<|channel>thought\n{self.thought}<channel|>" if self.thought else ""
        return thought + self.text + "".join(calls) + ("<|tool_response>" if calls else "")


Script = Callable[[Body], Turn | str]  # a body -> what is answered; a text is written as it stands


@dataclass
class Exchange:
    """One request and its answer, as they went over the wire."""

    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytearray = field(default_factory=bytearray)
    status: int = 0
    answer: bytearray = field(default_factory=bytearray)
    gone: bool = False  # the client went before the end

    @property
    def body(self) -> Body:
        body: Body = json.loads(self.raw) if self.raw else {}
        return body

    @property
    def events(self) -> list[dict[str, Any]]:
        """The chunks of a stream, or the body of an answer as the only one."""
        text = self.answer.decode()
        if not text.startswith((":", "data: ")):
            return [json.loads(text)] if text.startswith("{") else []
        data = [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]
        return [json.loads(part) for part in data if part != "[DONE]"]


_asked: ContextVar[Exchange] = ContextVar("asked")


class Recorder:
    """Writes down every exchange."""

    def __init__(self, app: ASGIApp, log: list[Exchange]):
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        exchange = Exchange(scope["method"], scope["path"], headers)
        self.log.append(exchange)
        _asked.set(exchange)

        async def received() -> Message:
            message = await receive()
            exchange.raw += message.get("body", b"")
            exchange.gone |= message["type"] == "http.disconnect" and not exchange.answer.endswith(b"[DONE]\n\n")
            return message

        async def sent(message: Message) -> None:
            exchange.status = message.get("status", exchange.status)
            exchange.answer += message.get("body", b"")
            await send(message)

        await self.app(scope, received, sent)


class Scripted(Engine):
    """An engine whose model says what a script makes of the body that was posted."""

    def __init__(self, loaded: Loaded, family: Family, script: Script):
        self.words, self.family, self.script = loaded.tokenizer, family, script
        super().__init__(loaded.pair, loaded.tokenizer, Prefixes(loaded.pair, CACHE, near=8))

    def stream(self, request: Request) -> Stream:
        turn = self.script(_asked.get().body)
        text = turn if isinstance(turn, str) else turn.written(self.family)
        said = self.words.encode(text, add_special_tokens=False)
        # Drafts need a few tokens beyond the end.
        ids = mx.array([0] * len(request.prompt) + said + [self.words.eos_token_id] * 64, mx.int32)
        mx.eval(ids)
        return super().stream(replace(request, options=replace(request.options, sampler=Says(ids), drafts="argmax")))


@dataclass(frozen=True)
class Place:
    """A running server, and what has gone over its wire."""

    url: str
    exchanges: list[Exchange]
    engine: Engine


class Skimming(AlteredTarget):
    """A target that reads no prompts: of what it is not shown in a round it knows nothing."""

    def __call__(self, tokens: mx.array, cache: Cache, span: Span) -> Output:
        if span.length <= MAX_BLOCK:
            return super().__call__(tokens, cache, span)
        embedded = self.embed(tokens)
        return Output(mx.zeros((*tokens.shape, self.vocabulary)), mx.zeros(embedded.shape))


@contextmanager
def scripted(family: Family, script: Script, skims: bool = False) -> Iterator[Place]:
    """A server whose model is given its words."""
    loaded = replace(skimming_model(), tokenizer=_tokenizer(family)) if skims else wide_model(family)
    with _serving(loaded, Scripted(loaded, family, script), Access()) as place:
        yield place


@contextmanager
def unscripted(model: str = DEMO, key: str | None = None) -> Iterator[Place]:
    """A server with a model that speaks for itself."""
    loaded = load_pair(model)
    engine = Engine(loaded.pair, loaded.tokenizer, Prefixes(loaded.pair, CACHE, near=8))
    with _serving(loaded, engine, Access(key=key)) as place:
        yield place


@contextmanager
def _serving(loaded: Loaded, engine: Engine, access: Access) -> Iterator[Place]:
    log: list[Exchange] = []
    limits = Limits(grace=0.5)
    service = Service.of(loaded, engine, slots=4, names=(NAME,), context=CONTEXT)
    app = make_app(service, limits, access)
    app.add_middleware(Recorder, log=log)
    with listen("127.0.0.1", 0) as bound:
        server = Server(app, engine, limits)
        thread = Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            yield Place(f"http://127.0.0.1:{bound.getsockname()[1]}", log, engine)
        finally:
            server.should_exit = True
            thread.join()
            engine.close(10)


@cache
def wide_model(family: Family) -> Loaded:
    """A tiny pair with a vocabulary in which English and code are short."""
    source, assistant = (
        (FIXTURES / "qwen3_5_tied", None) if family == "qwen" else (FIXTURES / "gemma4_keqv", "assistant")
    )
    with tempfile.TemporaryDirectory() as folder:
        _widen(source, Path(folder))
        if assistant:
            _widen(source / assistant, Path(folder) / assistant)
        loaded = load_pair(folder, dtype=mx.float32)
        mx.eval(loaded.pair.target.embed(mx.array([[0]])))
    return replace(loaded, tokenizer=_tokenizer(family), target=f"tiny-{family}")


@cache
def skimming_model() -> Loaded:
    """The same, skimming. It is Gemma's, whose layers have no state to get wrong, and speaks either language."""
    loaded = wide_model("gemma")
    target = Skimming(loaded.pair.target, context=CONTEXT)
    return replace(loaded, pair=Pair(target, loaded.pair.drafter, Programs(), None), target="tiny-skimming")


def _widen(source: Path, folder: Path) -> None:
    """A copy of a checkpoint whose vocabulary repeats until it is wide."""
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(
        json.dumps(config | ({"vocab_size": VOCABULARY} if "vocab_size" in config else {}))
    )
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    for name, tensor in weights.items():
        if name.endswith("embed_tokens.weight"):
            weights[name] = mx.tile(tensor, (-(-VOCABULARY // len(tensor)), 1))[:VOCABULARY]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    for path in (*source.glob("tokenizer*"), *source.glob("generation_config.json")):
        (folder / path.name).write_bytes(path.read_bytes())


@cache
def _tokenizer(family: Family) -> TokenizerWrapper:
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(MARKERS), initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    made.train([str(path) for path in sorted([*ROOT.glob("*/*.py"), *ROOT.rglob("*.md")])], trainer)
    ends = ["<eos>", "<|im_end|>" if family == "qwen" else "<turn|>"]
    markers = [text for text in MARKERS if text.endswith("os>") or (text in QWENS) is (family == "qwen")]
    made.add_tokens([AddedToken(text, normalized=False, special=text.endswith("os>")) for text in markers])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TAGS if family == "qwen" else BRACES
    return TokenizerWrapper(fast, eos_token_ids=fast.convert_tokens_to_ids(ends))
