"""`mtp-mlx chat`: a conversation in the terminal, one line after the other."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from mtp_mlx.cli.display import Notes, PromptBar, Writer, note, stats_table
from mtp_mlx.cli.options import (
    Adapter,
    Cached,
    Depth,
    Drafter,
    DrafterBits,
    Dtype,
    KvBits,
    MinP,
    Model,
    Parts,
    PromptCache,
    Temperature,
    TopK,
    TopP,
    check_drawn,
    parse_depth,
)
from mtp_mlx.conversation import Conversations, Talk
from mtp_mlx.dialects import find_dialect
from mtp_mlx.engine import Engine, Piece, Request
from mtp_mlx.errors import MTPError, RequestError
from mtp_mlx.hub import DEMO
from mtp_mlx.loading import Loaded
from mtp_mlx.options import Options
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.prompts import check_text
from mtp_mlx.sampling import choose_sampler
from mtp_mlx.speech import Content, Event, Parser, Reasoning

HELP = """\
/clear   forget the conversation     /stats   figures of the last answer
/help    this text                   /exit    leave, as does Ctrl-D
A line that ends in \\ goes on in the next one. Ctrl-C ends an answer."""


def command(
    model: Model = DEMO,
    drafter: Drafter = "auto",
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Tokens of an answer; -1 for as many as the context holds.")
    ] = -1,
    depth: Depth = "auto",
    temp: Temperature = 0.0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    top_k: TopK = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling, the same for every answer.")] = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Let a model reason before it answers, or not.")
    ] = None,
    dtype: Dtype = "auto",
    drafter_bits: DrafterBits = "auto",
    kv_bits: KvBits = "none",
    prompt_cache: PromptCache = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Report what is decided about the files.")] = False,
) -> None:
    """Talk to a model. Each line is a message; /help lists what else can be said.

    Example: mtp-mlx chat --model google/gemma-4-E4B-it --temp 1 --top-p 0.95
    """
    sampler = choose_sampler(temp, top_p, min_p, top_k)
    check_drawn(temp, top_p=(top_p, 1), min_p=(min_p, 0), top_k=(top_k, 0))
    options = Options(max_tokens, parse_depth(depth), sampler, seed=seed)
    cached = Cached.parse(prompt_cache)
    with Notes(verbose) as notes:
        loaded = Parts(model, drafter, dtype, drafter_bits, kv_bits, adapter).load()
        if not loaded.tokenizer.has_chat_template:
            raise RequestError(f"{model} has no chat template, so it cannot chat; try mtp-mlx generate")
        if verbose or (drafter == "auto" and not loaded.expected):
            note(f"drafter: {loaded.drafter or 'none'} ({loaded.drafter_reason})")
        notes.show()
        Conversation(loaded, system, think, options, cached.open(loaded), notes).run()


class Conversation:
    """What was said, and the engine that answers."""

    def __init__(
        self,
        loaded: Loaded,
        system: str | None,
        thinking: bool | None,
        options: Options,
        prefixes: Prefixes,
        notes: Notes,
    ):
        self._loaded, self._thinking, self._notes = loaded, thinking, notes
        self._begin = [{"role": "system", "content": system}] if system else []
        self._said = list(self._begin)
        self._dialect = find_dialect(loaded.tokenizer.get_vocab())
        self._options = replace(options, stops=self._dialect.stops)
        self._conversations = Conversations(loaded.tokenizer, self._dialect)
        self._conversations.check_switch(thinking)
        self._engine = Engine(loaded.pair, loaded.tokenizer, prefixes)
        self._last: Piece | None = None

    def run(self) -> None:
        try:
            for line in _lines():
                if line == "/exit":
                    return
                try:
                    self._take(line)
                except MTPError as error:  # the conversation goes on without what could not be answered
                    note(f"mtp-mlx: {error}")
                except KeyboardInterrupt:  # before the answer began, or when it was over
                    note("broken off")
        finally:
            self._engine.close()

    def _take(self, line: str) -> None:
        if line == "/clear":
            self._said = list(self._begin)
        elif line == "/stats" and self._last:
            ended = self._last.finish_reason or "broken off"
            stats_table(self._last.stats, ended, {"drafter": self._loaded.drafter or "none"})
        elif line in ("/help", "/stats"):
            note(HELP if line == "/help" else "nothing has been answered yet")
        elif line.startswith("/"):
            note(f"{line.split()[0]} is not a command; /help lists them")
        elif line.strip():
            self._answer(line)

    def _answer(self, line: str) -> None:
        check_text(line)
        asked = [*self._said, {"role": "user", "content": line}]
        prompt = self._conversations.prompt(Talk(asked, thinking=self._thinking))
        stream = self._engine.stream(Request(prompt.ids, self._options, marks=prompt.marks))
        answer = Answer(Parser(self._dialect, tools={}, starts_thinking=prompt.starts_thinking))
        try:
            with PromptBar() as progress, suppress(KeyboardInterrupt):
                for event in stream:
                    if isinstance(event, Piece):
                        answer.take(event)
                        self._last = event
                    else:
                        progress(event.done, event.total)
        finally:
            stream.close()
            answer.finish()
        self._notes.show()
        if not answer.ids:
            note("broken off before the answer began; the message is forgotten")
            return
        self._conversations.remember([*prompt.ids, *answer.ids])
        self._said = [*asked, answer.message()]


class Answer:
    """Shows what the model says, its thoughts paler, and keeps it for the next turn."""

    def __init__(self, parser: Parser):
        self.ids: list[int] = []
        self._parser = parser
        self._writer = Writer(show_drafts=False)
        self._texts: dict[type[Event], str] = {Content: "", Reasoning: ""}

    def take(self, piece: Piece) -> None:
        for token in piece.tokens:
            self.ids.append(token.id)
            self._say(self._parser.feed(token.id, token.text))

    def finish(self) -> None:
        self._say(self._parser.finish("stop"))
        self._writer.finish()

    def message(self) -> dict[str, str]:
        """The answer as a message of the conversation."""
        thoughts = {"reasoning_content": self._texts[Reasoning]} if self._texts[Reasoning] else {}
        return {"role": "assistant", "content": self._texts[Content], **thoughts}

    def _say(self, events: list[Event]) -> None:
        for event in events:
            assert isinstance(event, Content | Reasoning), "without tools nothing is a call"
            if isinstance(event, Content) and self._texts[Reasoning] and not self._texts[Content]:
                self._writer.write("\n\n", pale=True)
            self._writer.write(event.text, pale=isinstance(event, Reasoning))
            self._texts[type(event)] += event.text


def _lines() -> Iterator[str]:
    """What the user says, until the end of input."""
    asking = sys.stdin.isatty()
    while True:
        try:
            line = _line("> " if asking else "")
            while line.endswith("\\"):
                line = line[:-1]
                with suppress(EOFError):  # the next line there is not
                    line += "\n" + _line(". " if asking else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 text ({error})") from None
        yield line


def _line(prompt: str) -> str:
    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401  (editing and history for `input`)
    return input(prompt)
