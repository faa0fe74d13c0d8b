"""One loaded pair on one thread: several requests share it in small slices, so that a short one never waits for long.

Texts whose prompts have been read are written together, in one batch, where that is measured to be faster.

The engine knows ids and text, nothing of chats or wires. All of MLX happens on its thread; who asks only waits.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.depth import Fixed
from mtp_mlx.errors import BusyError, MTPError, RequestError
from mtp_mlx.generation import Origin, Progress, Response, Turn, Writing, generation, wired
from mtp_mlx.options import Options
from mtp_mlx.prefixes import Prefixes, Usage
from mtp_mlx.stats import Stats
from mtp_mlx.stops import StopText
from mtp_mlx.together import Together
from mtp_mlx.types import Pair

SLOTS = 4  # requests that are worked on in turn
WAITING = 16  # requests that may wait for their turn; beyond, they are refused
CHUNK = 512  # tokens of a slice of reading
ROUNDS = 4  # of a slice of writing
AHEAD = 256  # events that a slow reader may leave unread before its request rests
SETTLED = 2.0  # seconds without a request after which the prompt cache is written to disk
FLUSH = 0.05  # seconds of writing after which a newcomer is looked for
REST = 0.01  # seconds to wait where every request rests

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be generated."""

    prompt: list[int]
    options: Options = field(default_factory=Options)
    stop: tuple[str, ...] = ()  # texts that end the output and are not a part of it
    marks: tuple[int, ...] = ()  # numbers of tokens of the prompt after which other prompts may differ
    top_logprobs: int | None = None  # how many of the most probable tokens are told of; None: not even the chosen one's


@dataclass(frozen=True)
class Token:
    """A token that has come for good."""

    id: int
    text: str  # what it adds; "" while a character is incomplete, and only its beginning if a stop text follows
    origin: Origin
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # ids and log-probabilities, the most probable one first


@dataclass(frozen=True)
class Piece:
    """Tokens that have come for good: no stop text begins in them. The last piece says why there are no more."""

    tokens: tuple[Token, ...]
    stats: Stats  # the figures so far, those of tokens that are held back included
    finish_reason: Literal["stop", "length"] | None = None
    stop: str | None = None  # the stop text that was met

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


Event = Progress | Piece


class Load(NamedTuple):
    """How many requests there are."""

    live: int
    waiting: int


class Engine:
    """Serves requests until it is closed. May be called from any thread.

    What is read and written goes through `prefixes`, a store of the same pair, if there is one.
    """

    def __init__(
        self,
        pair: Pair,
        tokenizer: TokenizerWrapper,
        prefixes: Prefixes | None = None,
        *,
        slots: int = SLOTS,
        waiting: int = WAITING,
    ):
        if pair.agreed.size > 1:
            raise RequestError("an engine runs on one machine: several would have to be asked in the same order")
        self._pair, self._tokenizer = pair, tokenizer
        self._together = Together(pair)
        self._prefixes = prefixes or Prefixes(pair, 0)  # it knows what texts have been promised, if nothing else
        self._slots, self._room = slots, waiting
        self._waiting: deque[_Job] = deque()
        self._live: deque[_Job] = deque()
        self._changed = threading.Condition()  # of `_waiting` and `_closed`
        self._closed = False
        self._turns = 0  # since a newcomer was let in
        self._full = False  # a newcomer has found no memory; nobody has left since
        self._usage = prefixes.usage if prefixes else None  # the cache itself belongs to the thread
        self._thread = threading.Thread(target=self._work, name="mtp-mlx engine", daemon=True)
        self._thread.start()

    def stream(self, request: Request) -> "Stream":
        """What comes of a request; closing the stream, or dropping it, cancels the request within a slice.

        Raises BusyError where too many wait already or the engine is closed. What cannot be served raises
        RequestError where the stream is read.
        """
        with self._changed:
            if self._closed:
                raise BusyError("the engine is closed")
            self._waiting = deque(job for job in self._waiting if not job.cancelled.is_set())
            if len(self._waiting) >= self._room:
                raise BusyError(f"{self._room} requests wait already; ask again later")
            job = _Job(self._pair, self._tokenizer, self._prefixes, request)
            self._waiting.append(job)
            self._changed.notify()
        return Stream(job)

    @property
    def load(self) -> Load:
        return Load(len(self._live), len(self._waiting))

    @property
    def usage(self) -> Usage | None:
        """What the prompt cache has been good for when the latest request ended, if there is one."""
        return self._usage

    def close(self, timeout: float | None = None) -> None:
        """Cancel all requests and end the thread; whoever still reads gets a BusyError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        try:
            with wired():
                self._serve()
        except Exception:
            _log.exception("a fault ended the engine")
        self._end()

    def _serve(self) -> None:
        while not self._closed:
            self._admit()
            self._turns += 1
            if not self._live:
                self._idle()
            elif all(job.rests for job in self._live):
                self._wait(REST)
            else:
                self._slice()

    def _end(self) -> None:
        """Whoever waits is told, however it came about."""
        with self._changed:
            self._closed = True
        for job in (*self._live, *self._waiting):
            job.fail(BusyError("the engine was closed"))
        self._prefixes.close()
        # A stream of a thread that has ended aborts the program at its exit, if an array still knows it.
        mx.clear_streams()

    def _slice(self) -> None:
        """Give the next request its turn, and with it those that are written together with it."""
        job = self._live[0]
        if job.rests:
            self._live.rotate(-1)
        elif job.writing:
            self._write(job.writing)
        else:
            try:
                self._go_on([job], [None])
            except BusyError:
                self._put_back(job)

    def _write(self, first: Writing) -> None:
        """A slice of writing: a few rounds of a text and its company."""
        # Whether a job rests is asked once: its reader is on another thread.
        able = {id(job.writing): job for job in self._live if job.writing is first or (job.writing and not job.rests)}
        others = [job.writing for job in able.values() if job.writing and job.writing is not first]
        writings = self._together.company([first, *others])
        jobs = [able[id(writing)] for writing in writings]
        for _ in range(ROUNDS):
            turns: list[Turn | None] = []
            try:
                turns += self._together.round(writings)
            except Exception as error:  # of the device, and so of all of them
                turns += [Turn(error, Fixed(0)) for _ in writings]
            if not self._go_on(jobs, turns):
                return

    def _go_on(self, jobs: "list[_Job]", turns: list[Turn | None]) -> bool:
        """Let requests go on, behind all others then; whether none of them has ended."""
        more = True
        for job, turn in zip(jobs, turns, strict=True):
            goes_on = job.go_on(turn)
            self._live.remove(job)
            if goes_on:
                self._live.append(job)
            else:
                more = self._full = False
                self._count()
        return more

    def _put_back(self, job: "_Job") -> None:
        """It is the first of those who wait until somebody has left, and memory with him."""
        job.begin()
        with self._changed:
            self._live.remove(job)
            self._waiting.appendleft(job)
        self._full = True

    def _count(self) -> None:
        if self._usage:
            self._usage = self._prefixes.usage

    def _admit(self) -> None:
        """A newcomer has the next turn, behind those who have left: what was read for them may be of use.

        Between two newcomers somebody else has a turn, or a crowd of short requests would hold up the others.
        """
        for job in [job for job in self._live if job.cancelled.is_set()]:
            job.go_on(None)
            self._live.remove(job)
            self._full = False
        with self._changed:
            if self._waiting and (not self._live or (self._free and self._turns > 1)):
                self._live.appendleft(self._waiting.popleft())
                self._turns = 0

    @property
    def _free(self) -> bool:
        """Whether there is a place for a newcomer."""
        return len(self._live) < self._slots and not self._full

    def _idle(self) -> None:
        """Wait for somebody; what is to outlive the program is written once nobody has come for a while."""
        self._wait(SETTLED)
        while not self._waiting and not self._closed and self._flush():
            pass
        self._count()
        self._wait(None)

    def _flush(self) -> bool:
        """Write something of the prompt cache; whether more is left."""
        try:
            return self._prefixes.flush(FLUSH)
        except Exception:  # whatever it is, requests go on
            _log.exception("a fault while writing the prompt cache")
            return False

    def _wait(self, seconds: float | None) -> None:
        """Until somebody asks, or the engine is closed."""
        with self._changed:
            if not self._closed and not (self._waiting and self._free):
                self._changed.wait(seconds)


class Stream:
    """The events of one request, in order, for one reader."""

    def __init__(self, job: "_Job"):
        self._job = job
        self._ended = False

    def watch(self, callback: Callable[[], None]) -> None:
        """Have somebody told, on the engine's thread, whenever an event has come. One that came before is not."""
        self._job.told = callback

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None if none comes within so many seconds, at once for 0, or after the last one."""
        if self._ended:
            return None
        try:
            event = self._job.events.get(timeout=timeout) if timeout != 0 else self._job.events.get_nowait()
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            self._ended = True
            raise event
        # None: somebody has closed it meanwhile.
        self._ended = event is None or (isinstance(event, Piece) and event.finish_reason is not None)
        return event

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self.get()
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        """Nobody wants more of it. A reader that waits for the next event gets none."""
        self._ended = True
        self._job.cancelled.set()
        self._job.events.put(None)

    def __del__(self) -> None:
        self._job.cancelled.set()


class _Job:
    """A request that is being served, on the engine's thread; its events go to the reader's."""

    def __init__(self, pair: Pair, tokenizer: TokenizerWrapper, prefixes: Prefixes, request: Request):
        self.events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.told: Callable[[], None] | None = None
        self._request = request
        self._stop = StopText(request.stop)
        self._held: deque[Token] = deque()  # tokens in whose text a stop text may have begun
        self._free = 0  # characters of them that are certain
        self._resting = False
        options = replace(request.options, prefill_step_size=min(CHUNK, request.options.prefill_step_size))
        self._generation = partial(generation, pair, tokenizer, request.prompt, options, prefixes, request.marks)
        self.begin()

    def begin(self) -> None:
        """Begin, or begin anew where nothing has come yet. Nothing runs before the first slice."""
        self._source = self._generation()
        self.writing: Writing | None = None  # what wants a round, if anything does

    @property
    def rests(self) -> bool:
        """Whether its reader is too far behind, until half of that has been read: leaving a batch is not for free."""
        self._resting = self.events.qsize() >= (AHEAD // 2 if self._resting else AHEAD)
        return self._resting and not self.cancelled.is_set()

    def go_on(self, turn: Turn | None) -> bool:
        """Go on until a chunk has been read or a round is wanted, which came with `turn`; whether there is more to do.

        Raises BusyError where it cannot begin yet.
        """
        try:
            if not self.cancelled.is_set():
                return self._slice(turn)
            self.writing = None
            self._source.close()
        except MTPError as error:
            if isinstance(error, BusyError) and turn is None:
                raise
            self.fail(error)
        except Exception as error:  # whatever it is, other requests go on
            _log.exception("a fault while serving a request")
            self.fail(error)
        return False

    def fail(self, error: Exception) -> None:
        """End it with an error for its reader, even where it cannot be ended well."""
        self.writing = None
        try:
            self._source.close()
        except Exception:
            _log.exception("a fault while a request was ended")
        self._tell(_bare(error))

    def _slice(self, turn: Turn | None) -> bool:
        self.writing = None
        event = self._source.send(turn)
        while not isinstance(event, Writing):
            if isinstance(event, Progress):
                self._tell(event)
                if event.cached < event.done < event.total:  # a chunk has been read
                    return True
            elif self._emit(event):
                self._source.close()
                return False
            event = next(self._source)
        self.writing = event
        return True

    def _tell(self, event: Event | BaseException) -> None:
        self.events.put(event)
        try:
            if self.told:
                self.told()
        except Exception:  # it is not the engine's
            _log.exception("a fault of one who watches a request")

    def _emit(self, responses: list[Response]) -> bool:
        """Hand on the tokens of a round; whether it was the last one."""
        tokens: list[Token] = []
        stop = None
        for response in responses:
            self._held.append(self._token(response))
            text, stop = self._stop.feed(response.text)
            tokens += self._released(len(text))
            if stop is not None:
                tokens += self._cut()
                break
        reason = "stop" if stop is not None else responses[-1].finish_reason
        if reason and stop is None:
            tokens += self._released(len(self._stop.finish()))
        self._tell(Piece(tuple(tokens), responses[-1].stats, cast(Literal["stop", "length"] | None, reason), stop))
        return reason is not None

    def _token(self, response: Response) -> Token:
        if self._request.top_logprobs is None:
            return Token(response.token, response.text, response.origin)
        row = response.logprobs.astype(mx.float32)
        count = min(self._request.top_logprobs, row.size)
        best: list[int] = []
        if count:
            ids = mx.argpartition(-row, count - 1)[:count]
            best = cast(list[int], ids[mx.argsort(-row[ids])].tolist())
        values = cast(list[float], row[mx.array([response.token, *best])].tolist())
        return Token(
            response.token, response.text, response.origin, values[0], tuple(zip(best, values[1:], strict=True))
        )

    def _released(self, characters: int) -> Iterator[Token]:
        """The tokens that so many more characters complete."""
        self._free += characters
        while self._held and len(self._held[0].text) <= self._free:
            self._free -= len(self._held[0].text)
            yield self._held.popleft()

    def _cut(self) -> Iterator[Token]:
        """What stands before a stop text in the token in which it begins."""
        if self._free:
            yield replace(self._held[0], text=self._held[0].text[: self._free])


def _bare(error: Exception) -> Exception:
    """An error without the frames it came through: they know of every text that was written, and of its buffers."""
    link: BaseException | None = error
    while link and link.__traceback__:
        link.__traceback__, link = None, link.__cause__ or link.__context__
    return error
