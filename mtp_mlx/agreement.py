"""What several machines that run one pair have to decide as one: where their numbers might differ, rank 0's hold.

Rounding differs between chips and clocks differ anyway. A token or a depth that two machines see differently would have
them wait for each other in different places, for ever. Seeds may differ: what others draw by theirs is overruled.
"""

import os
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import TypeVar, cast

import mlx.core as mx

from mtp_mlx.errors import GroupError, MTPError, RequestError

PATIENCE = 300.0  # seconds that one round, or one chunk of a prompt, may take before the others are taken to be gone
LOADING = 3600.0  # seconds that the slowest machine may take longer to load
TICK = 0.2  # seconds from one look at the clock to the next

Item = TypeVar("Item")


@dataclass(frozen=True)
class Agreement:
    """Agrees on values by adding up rank 0's and zeros. Alone, everything is as it is given."""

    group: mx.distributed.Group | None = field(default=None, compare=False)
    patience: float = PATIENCE

    @property
    def rank(self) -> int:
        return self.group.rank() if self.group else 0

    @property
    def size(self) -> int:
        """How many machines there are."""
        return self.group.size() if self.group else 1

    def tokens(self, chosen: mx.array) -> mx.array:
        """Rank 0's array, lazily. Every machine has to come here with the same shape, at the same place."""
        if self.size == 1:
            return chosen
        # Not zeros alone: without the array behind it the sum might be sent before what the others send first.
        return mx.distributed.all_sum(mx.where(self.rank == 0, chosen, 0), group=self.group)

    def ids(self, ids: list[int]) -> list[int]:
        """Rank 0's list, whatever the others have."""
        if self.size == 1:
            return ids
        length = cast(int, self.tokens(mx.array(len(ids), mx.int32)).item())
        mine = (ids + [0] * length)[:length]
        return cast(list[int], self.tokens(mx.array(mine, mx.int32)).tolist())

    def seconds(self, measured: float) -> float:
        """Rank 0's measurement."""
        return measured if self.size == 1 else cast(float, self.tokens(mx.array(measured, mx.float32)).item())

    def least(self, number: int) -> int:
        """The least of all machines' numbers."""
        if self.size == 1:
            return number
        return cast(int, mx.distributed.all_min(mx.array(number, mx.int32), group=self.group).item())

    def compare(self, loaded: str) -> None:
        """Wait until all machines are here. Raises RequestError where they have not come with the same text."""
        if self.size == 1:
            return
        stranger = _stranger(self._everyones(_digest(loaded), LOADING))
        if stranger:
            raise RequestError(
                f"rank {stranger} has loaded something else than rank 0; give all {self.size} machines the "
                "same files of target and drafter, the same options, and the same versions of mlx and mtp-mlx"
            )

    @contextmanager
    def asked(self, options: str) -> Iterator[None]:
        """What is looked at before a text: what one machine refuses, all of them refuse, and none goes on alone.

        Raises RequestError where another one has refused it, or has been asked for it with other options.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except MTPError:
            self._everyones(REFUSED, self.patience)
            raise
        found = self._everyones(_digest(options), self.patience)
        if REFUSED in found:
            raise RequestError(
                f"rank {found.index(REFUSED)} of {self.size} has refused this text, so nobody writes it; its own "
                "message tells why"
            )
        stranger = _stranger(found)
        if stranger:
            raise RequestError(
                f"rank {stranger} is asked for another text than rank 0, or for the same one in another way; ask all "
                f"{self.size} machines for the same texts, in the same order, with the same options"
            )

    def _everyones(self, mine: list[int], seconds: float) -> list[list[int]]:
        """The lists of all machines, which are of one length."""
        with self._watched(seconds), self._sudden():
            row = mx.array(mine, mx.int32)[None]
            return cast(list[list[int]], mx.distributed.all_gather(row, group=self.group).tolist())

    def together(self, slices: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """The same slices of work, each of which ends in an error where the others are gone.

        Raises GroupError where MLX tells so. Where it waits, the process ends after `patience` seconds.
        """
        with closing(slices):
            while True:
                with self._watched(self.patience), self._sudden():
                    try:
                        item = next(slices)
                    except StopIteration:
                        return
                yield item

    @contextmanager
    def _watched(self, seconds: float) -> Iterator[None]:
        if self.size == 1:
            yield
            return
        with self._watch.limit(seconds):
            yield

    @cached_property
    def _watch(self) -> "Watch":
        return Watch(f"rank {self.rank} of {self.size}")

    @contextmanager
    def _sudden(self) -> Iterator[None]:
        """What MLX raises where a connection ends, as an error of ours."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not str(error).startswith(BACKENDS):
                raise
            raise GroupError(
                f"rank {self.rank} of {self.size} has lost another machine of its group ({error}); what that one says "
                "tells why; start all of them again"
            ) from error


REFUSED = [-1] * 32  # in place of a digest


def _digest(text: str) -> list[int]:
    return list(sha256(text.encode()).digest())


def _stranger(found: list[list[int]]) -> int:
    """The first rank whose list is not rank 0's; 0 where all are the same."""
    return next((rank for rank, each in enumerate(found) if each != found[0]), 0)


BACKENDS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]")  # how their errors begin
ALONE = Agreement()


class Watch:
    """Ends the process where something takes longer than it may.

    A machine that hangs, or a cable that is pulled, leaves the others waiting inside MLX, where nothing can wake them.
    """

    def __init__(self, name: str):
        self._name = name
        self._seconds = self._end = float("inf")
        threading.Thread(target=self._look, name="mtp-mlx watch", daemon=True).start()

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        before = self._seconds, self._end
        self._seconds, self._end = seconds, time.monotonic() + seconds
        try:
            yield
        finally:
            self._seconds, self._end = before

    def _look(self) -> None:
        while time.monotonic() < self._end:
            time.sleep(TICK)
        sys.stderr.write(
            f"mtp-mlx: {self._name} has waited {self._seconds:g} s for the others, which hang or are gone; start all "
            "of them again, or read the prompt in smaller steps if they are only slow\n"
        )
        sys.stderr.flush()
        os._exit(1)
