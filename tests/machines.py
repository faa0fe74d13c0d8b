"""Several machines: as threads of a test, which meet for every sum, and as processes that MLX's ring joins.

As a program it is one of those processes: it reads what is to be written from its arguments and prints it as JSON.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar, cast

import mlx.core as mx

from mtp_mlx import Sample, stream_generate
from mtp_mlx.agreement import Agreement
from mtp_mlx.errors import RequestError
from mtp_mlx.loading import load_pair
from mtp_mlx.models.parts import Part

Result = TypeVar("Result")
# How texts are written: the last one of every pair may differ from one start to the next, not from rank to rank.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"depth": 3},
    {"depth": 2, "seed": 5, "sampler": Sample(1.0)},
    {"sampler": Sample(0.8)},
)


class Meeting:
    """Where threads bring an array each and see everybody's."""

    def __init__(self, size: int):
        self.size = size
        self._barrier = Barrier(size, timeout=60)
        self._brought: list[mx.array] = [mx.array(0)] * size

    def all_of(self, rank: int, array: mx.array) -> list[mx.array]:
        mx.eval(array)  # only the thread that has built it can
        self._brought[rank] = array
        self._barrier.wait()
        found = list(self._brought)
        self._barrier.wait()
        assert len({(each.shape, each.dtype) for each in found}) == 1, "nobody could add these up"
        return found

    def part(self, rank: int) -> Part:
        return Part(rank, self.size, lambda x: sum(self.all_of(rank, x), mx.zeros_like(x)))

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """The same work on every machine, and what each returns."""

        def alone(rank: int) -> Result:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as threads:
            return [future.result() for future in [threads.submit(alone, rank) for rank in range(self.size)]]


@dataclass(frozen=True)
class Seat(Agreement):
    """An agreement of threads."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))
    place: int = 0

    @property
    def rank(self) -> int:
        return self.place

    @property
    def size(self) -> int:
        return self.meeting.size

    def tokens(self, chosen: mx.array) -> mx.array:
        return self.meeting.all_of(self.place, chosen)[0]

    def least(self, number: int) -> int:
        return min(cast(int, each.item()) for each in self.meeting.all_of(self.place, mx.array(number)))

    def _everyones(self, mine: list[int], seconds: float) -> list[list[int]]:
        return [cast(list[int], each.tolist()) for each in self.meeting.all_of(self.place, mx.array(mine))]


def start(size: int, folder: Path, *command: str) -> list[subprocess.Popen[str]]:
    """A process for every rank, joined as mlx.launch does it."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    for each in sockets:
        each.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    shared = {**os.environ, "MLX_DISABLE_COMPILE": "1", "MLX_HOSTFILE": str(folder / "hosts.json")}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "MLX_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]


def main(folders: list[str], tokens: int, end: str) -> None:
    """Write some texts with each pair; then rank 1 hangs in the middle of another, or rank 3 brings another checkpoint.

    The end is "halt" or "compare".
    """
    group = mx.distributed.init(strict=True, backend="ring")
    told: list[Any] = []
    for folder in folders:
        loaded = load_pair(folder, dtype=mx.float32, group=group)
        assert loaded.held is not None
        texts = [
            [
                r.token
                for r in stream_generate(loaded.pair, loaded.tokenizer, [7 + group.rank(), 8, 9], tokens, **options)
            ]
            for options in OPTIONS
        ]
        told.append({"texts": texts, "held": loaded.held.nbytes, "whole": loaded.held.whole})
    if end == "compare":
        try:
            loaded.pair.agreed.compare("another" if group.rank() == 3 else "the same")
        except RequestError as error:
            told.append(str(error))
    print(json.dumps(told), flush=True)
    if end == "halt":
        pair = replace(loaded.pair, agreed=replace(loaded.pair.agreed, patience=2.0))
        for i, _ in enumerate(stream_generate(pair, loaded.tokenizer, [7, 8, 9], 200)):
            if i == 5 and group.rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    main(sys.argv[3:], int(sys.argv[1]), sys.argv[2])
