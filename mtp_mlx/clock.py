"""Where the time of a round goes."""

import time
from typing import Any, NamedTuple

import mlx.core as mx


class Times(NamedTuple):
    """Seconds of one round. The phases are known only where the round was split to measure them."""

    total: float
    host: float  # building the graph and looking at the result
    commit: float | None  # what keeping a part of the block before costs caches and drafter
    draft: float | None
    verify: float | None


class Clock:
    """Times a round, and its phases if it is split."""

    def __init__(self, split: bool):
        self._split = split
        self._began = time.perf_counter()
        self._phases: list[float] = []
        self._paused = 0.0

    def wait(self, *arrays: Any, needed: bool = False) -> None:
        """The end of a phase; a round that is split waits for it, others only where it is needed."""
        if self._split or needed:
            self.evaluate(arrays)

    def evaluate(self, *arrays: Any) -> None:
        """The end of the last phase: wait until everything is there."""
        began = time.perf_counter()
        mx.eval(arrays)
        self._phases.append(time.perf_counter() - began)

    def pause(self, *arrays: Any) -> None:
        """Wait within a phase: the time is not the host's, but of none of the phases either."""
        began = time.perf_counter()
        mx.eval(arrays)
        self._paused += time.perf_counter() - began

    def times(self) -> Times:
        total = time.perf_counter() - self._began
        return Times(total, total - self._paused - sum(self._phases), *(self._phases if self._split else (None,) * 3))
