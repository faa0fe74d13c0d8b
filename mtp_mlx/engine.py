"""One loaded pair on one thread: several requests share it in small slices, so that a short one never waits for long.

The engine knows ids and text, nothing of chats or wires. All of MLX happens on its thread; who asks only waits.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.errors import BusyError, MTPError
from mtp_mlx.generate import Progress, Response, generation, wired
from mtp_mlx.stops import StopText
from mtp_mlx.types import Pair

SLOTS = 4  # requests that are worked on in turn
WAITING = 16  # requests that may wait for their turn; beyond, they are refused
CHUNK = 512  # tokens of a slice of reading
ROUNDS = 4  # of a slice of writing
AHEAD = 256  # events that a slow reader may leave unread before its request rests
REST = 0.01  # seconds to wait where every request rests

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be generated. `options` are those of `stream_generate`."""

    prompt: list[int]
    max_tokens: int = -1
    stop: tuple[str, ...] = ()  # texts that end the output and are not a part of it
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """Text that has come for good, no stop text begins in it. The last piece says why there is no more."""

    text: str
    response: Response  # of the newest token, with the figures so far
    tokens: tuple[int, ...]
    finish_reason: str | None = None


Event = Progress | Piece


class Engine:
    """Serves requests until it is closed. May be called from any thread."""

    def __init__(self, pair: Pair, tokenizer: TokenizerWrapper, slots: int = SLOTS, waiting: int = WAITING):
        self._pair, self._tokenizer, self._slots = pair, tokenizer, slots
        self._waiting: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._live: deque[_Job] = deque()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mtp-mlx engine", daemon=True)
        self._thread.start()

    def stream(self, request: Request) -> "Stream":
        """What comes of a request; closing the stream, or dropping it, cancels the request within a slice.

        Raises BusyError where too many wait already or the engine is closed. What cannot be served raises
        RequestError where the stream is read.
        """
        job = _Job(self._pair, self._tokenizer, request)
        if self._closed.is_set():
            raise BusyError("the engine is closed")
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise BusyError(f"{self._waiting.maxsize} requests wait already; ask again later") from None
        return Stream(job)

    def close(self, timeout: float | None = None) -> None:
        """Cancel all requests and end the thread; whoever still reads gets a BusyError."""
        self._closed.set()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)  # wakes it
        self._thread.join(timeout)

    def _work(self) -> None:
        with wired():
            while not self._closed.is_set():
                self._admit()
                worked = [self._slice() for _ in range(len(self._live))]
                if worked and not any(worked):
                    self._closed.wait(REST)
        while not self._waiting.empty():
            self._take(self._waiting.get())
        for job in self._live:
            job.fail(BusyError("the engine was closed"))

    def _slice(self) -> bool:
        """Give the next request its turn; whether it had anything to do."""
        job = self._live.popleft()
        if job.rests:
            self._live.append(job)
            return False
        if job.go_on():
            self._live.append(job)
        self._admit_waiting()
        return True

    def _admit(self) -> None:
        if not self._live:
            self._take(self._waiting.get())
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        """Newcomers have the next turn."""
        while len(self._live) < self._slots:
            try:
                self._take(self._waiting.get_nowait())
            except queue.Empty:
                return

    def _take(self, job: "_Job | None") -> None:
        if job is not None:
            self._live.appendleft(job)


class Stream:
    """The events of one request, in order, for one reader."""

    def __init__(self, job: "_Job"):
        self._job = job
        self._ended = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        event = self._job.events.get()
        if isinstance(event, BaseException):
            self._ended = True
            raise event
        self._ended = isinstance(event, Piece) and event.finish_reason is not None
        return event

    def close(self) -> None:
        """Nobody wants more of it."""
        self._ended = True
        self._job.cancelled.set()

    def __del__(self) -> None:
        self._job.cancelled.set()


class _Job:
    """A request that is being served, on the engine's thread; its events go to the reader's."""

    def __init__(self, pair: Pair, tokenizer: TokenizerWrapper, request: Request):
        self.events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self._stop = StopText(request.stop)
        options = {"prefill_step_size": CHUNK, **request.options}
        # Nothing of it runs before the first slice.
        self._source = generation(pair, tokenizer, request.prompt, request.max_tokens, **options)

    @property
    def rests(self) -> bool:
        """Whether its reader is too far behind."""
        return self.events.qsize() >= AHEAD and not self.cancelled.is_set()

    def go_on(self) -> bool:
        """One slice; whether there is more to do."""
        if self.cancelled.is_set():
            self._source.close()
            return False
        try:
            return self._slice()
        except MTPError as error:
            self.fail(error)
        except Exception as error:  # whatever it is, other requests go on
            _log.exception("a fault while serving a request")
            self.fail(error)
        return False

    def fail(self, error: Exception) -> None:
        """End it with an error for its reader."""
        self._source.close()
        self.events.put(error)

    def _slice(self) -> bool:
        for _ in range(ROUNDS):
            event = next(self._source)
            if isinstance(event, Progress):
                self.events.put(event)
                if 0 < event.done < event.total:  # a chunk has been read
                    return True
            elif self._emit(event):
                self._source.close()
                return False
        return True

    def _emit(self, responses: list[Response]) -> bool:
        """Hand on the text of a round; whether it was the last one."""
        text, stopped = self._stop.feed("".join(response.text for response in responses))
        reason = "stop" if stopped else responses[-1].finish_reason
        if reason and not stopped:
            text += self._stop.finish()
        tokens = tuple(response.token for response in responses)
        self.events.put(Piece(text, responses[-1], tokens, reason))
        return reason is not None
