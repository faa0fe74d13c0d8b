"""Machines decide as one; alone there is nothing to decide. With others: test_sharding.py."""

import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass

import mlx.core as mx
import pytest
from machines import Meeting, Seat

from mtp_mlx.agreement import ALONE, Agreement
from mtp_mlx.errors import GroupError, MTPError, PairError, RequestError


def test_alone_everything_is_as_it_is_given() -> None:
    tokens, ids = mx.array([[1, 2]]), [3, 4]
    assert ALONE.tokens(tokens) is tokens and ALONE.ids(ids) is ids
    assert ALONE.seconds(0.1) == 0.1 and ALONE.least(7) == 7
    ALONE.compare("anything")
    before = threading.active_count()
    assert list(ALONE.together(number for number in (1, 2))) == [1, 2]
    assert threading.active_count() == before


def test_a_group_of_one_is_alone() -> None:
    agreement = Agreement(mx.distributed.init())
    assert (agreement.rank, agreement.size) == (0, 1)
    assert agreement.ids([1]) == [1]


def test_lists_of_any_lengths_become_rank_0s() -> None:
    for lists in ([[1, 2, 3], [], [9]], [[], [5], [6, 7]]):
        meeting = Meeting(3)
        found = meeting.run(lambda rank: Seat(meeting=meeting, place=rank).ids(lists[rank]))  # noqa: B023
        assert found == [lists[0]] * 3


def test_the_least_and_the_first_seconds() -> None:
    meeting = Meeting(2)

    def work(rank: int) -> tuple[int, float]:
        seat = Seat(meeting=meeting, place=rank)
        return seat.least([9, 5][rank]), seat.seconds([0.1, 7.0][rank])

    (least, seconds), other = meeting.run(work)
    assert least == 5 and seconds == pytest.approx(0.1) and other == (least, seconds)


def test_a_text_that_one_machine_refuses_is_refused_by_all() -> None:
    """In its own words by that one. Otherwise the next text of one would be computed with the last of another."""
    meeting = Meeting(3)

    def work(rank: int) -> str:
        try:
            with Seat(meeting=meeting, place=rank).asked("depth 2"):
                if rank == 1:
                    raise PairError("it does not fit")
        except MTPError as error:
            return str(error)
        return "written"

    first, second, third = meeting.run(work)
    assert second == "it does not fit" and first == third
    assert first == "rank 1 of 3 has refused this text, so nobody writes it; its own message tells why"


def test_machines_that_are_asked_in_other_ways_refuse_the_text() -> None:
    meeting = Meeting(2)

    def work(rank: int, *options: str) -> str:
        try:
            with Seat(meeting=meeting, place=rank).asked(options[rank]):
                return "written"
        except RequestError as error:
            return str(error)

    assert meeting.run(lambda rank: work(rank, "depth 2", "depth 2")) == ["written"] * 2
    first, second = meeting.run(lambda rank: work(rank, "depth 2", "depth 3"))
    assert first == second and first.startswith("rank 1 is asked for another text than rank 0, or for the same one in")


@dataclass(frozen=True)
class Second(Agreement):
    """Rank 1 of 2."""

    @property
    def rank(self) -> int:
        return 1

    @property
    def size(self) -> int:
        return 2


def failing(error: Exception) -> Generator[int, None, None]:
    def slices() -> Generator[int, None, None]:
        yield 1
        raise error

    return Second().together(slices())


@pytest.mark.parametrize("backend", ["ring", "jaccl", "mpi", "nccl"])
def test_a_lost_connection_is_an_error_of_ours(backend: str) -> None:
    with pytest.raises(GroupError, match=r"rank 1 of 2 has lost another machine.*\(\[\w+\] gone\).*start all"):
        list(failing(RuntimeError(f"[{backend}] gone")))


@pytest.mark.parametrize("error", [RuntimeError("[matmul] shapes"), RequestError("[ring] as a prompt")], ids=str)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        list(failing(error))
    assert raised.value is error


def test_who_stops_asking_ends_the_slices() -> None:
    ended: list[bool] = []

    def slices() -> Generator[int, None, None]:
        try:
            yield 1
            yield 2
        finally:
            ended.append(True)

    text = Second().together(slices())
    assert next(text) == 1
    text.close()
    del text
    assert ended == [True]


def test_a_slice_that_takes_too_long_ends_the_process() -> None:
    code = (
        "import time; from mtp_mlx import agreement; agreement.TICK = 0.05\n"
        "watch = agreement.Watch('rank 1 of 2')\n"
        "for seconds in (5, 0.2):\n"
        "    with watch.limit(seconds): time.sleep(0.5)\n"
        "    print('in time', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "in time\n")
    assert done.stderr.startswith("mtp-mlx: rank 1 of 2 has waited 0.2 s for the others, which hang or are gone")


def test_a_limit_within_another_leaves_that_one_in_force() -> None:
    code = (
        "import time; from mtp_mlx import agreement; agreement.TICK = 0.05\n"
        "watch = agreement.Watch('rank 1 of 2')\n"
        "with watch.limit(0.3):\n"
        "    with watch.limit(5): pass\n"
        "    time.sleep(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "has waited 0.3 s" in done.stderr


def test_only_slices_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads slowly is not taken for a machine that hangs."""
    monkeypatch.setattr("mtp_mlx.agreement.TICK", 0.01)
    text = Second(patience=0.2).together(number for number in (1, 2))
    next(text)
    threading.Event().wait(0.4)
    assert list(text) == [2]  # the process is still there
