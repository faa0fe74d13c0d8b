"""Texts written together: which of them share a batch, how deep that drafts, and whether it pays."""

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import NamedTuple

from mtp_mlx import memory
from mtp_mlx.batch import Batch, Round
from mtp_mlx.depth import Depth, choose_depth
from mtp_mlx.errors import BusyError
from mtp_mlx.generation import Generation, Progress, Response, Turn, Writing
from mtp_mlx.rounds import next_round
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Drafter, Pair

SHORT = 2048  # rows; texts of at most so many are written together whatever their lengths
UNLIKE = 2  # otherwise none may have more than so many times the rows of another
WARM_UP = 2  # rounds of a batch that are not timed: they are being traced
TRIAL = 32  # rounds after which a way to write is judged
RETRIAL = 512  # rounds of one way after which the other one is tried again
SLOW = 3.0  # times the usual round: what took longer counts as so much
FADE = 0.98  # weight of what was measured, one round later


@dataclass
class _Live:
    """A text that is being written."""

    events: Generation
    writing: Writing | None = None


class Together:
    """Writes texts of one pair in one batch where that is faster than one after the other.

    What `pace` knows of that serves all texts of a pair, unless it is given.
    """

    def __init__(self, pair: Pair, pace: "Pace | None" = None):
        self._pair = pair
        self._pace: Pace = pace or pair.measured.setdefault("pace", Pace())
        self._policies: dict[tuple[int, int | str], tuple[Drafter, Depth]] = pair.measured.setdefault("together", {})

    def write(
        self, texts: Several[Callable[[], Generation]], at_once: int
    ) -> Iterator[tuple[int, Progress | list[Response]]]:
        """Write texts, at most so many at once: the number of each and what came of it.

        One for which there is no memory yet begins when another has ended. Raises what goes wrong in any of them.
        """
        waiting, live = deque(enumerate(texts)), dict[int, _Live]()
        full = 0  # how many were alive when one found no memory
        try:
            while waiting or live:
                while waiting and len(live) < min(at_once, full or at_once):
                    number, begin = waiting[0]
                    live[number] = _Live(begin())
                    try:
                        yield from self._told(number, live, None)
                    except BusyError:
                        del live[number]
                        if not live:
                            raise
                        full = len(live)
                        break
                    waiting.popleft()
                    full = 0
                writings = [text.writing for text in live.values() if text.writing]
                if writings:
                    yield from self._round(live, self.company(writings))
        finally:
            for text in live.values():
                text.events.close()

    def _round(
        self, live: "dict[int, _Live]", writings: list[Writing]
    ) -> Iterator[tuple[int, Progress | list[Response]]]:
        numbers = {id(text.writing): number for number, text in live.items()}
        for writing, turn in zip(writings, self.round(writings), strict=True):
            number = numbers[id(writing)]
            live[number] = live.pop(number)  # behind those that were not in this round
            yield from self._told(number, live, turn)

    def _told(
        self, number: int, live: "dict[int, _Live]", turn: Turn | None
    ) -> Iterator[tuple[int, Progress | list[Response]]]:
        """What a text says until it wants another round; one that has ended is not alive any more."""
        text = live[number]
        try:
            event = text.events.send(turn)
            while not isinstance(event, Writing):
                yield number, event
                event = next(text.events)
            text.writing = event
        except StopIteration:
            del live[number]

    def company(self, writings: Several[Writing]) -> list[Writing]:
        """Those that the first of these should have its next round with, itself included."""
        first = writings[0]
        mates = [first]
        for writing in writings[1:]:
            if _fit([*mates, writing]):
                mates.append(writing)
        together = len(mates) > 1 and self._pace.together(len(mates))
        return mates if together else [first]

    def round(self, writings: Several[Writing]) -> list[Turn]:
        """A round of these texts, which `company` has put together."""
        if len(writings) == 1:
            writings[0].sequence.batch.release([writings[0].sequence])
            turns = [writings[0].round()]
        else:
            policy = self._policy(len(writings), writings[0].options.depth)
            batch = self._gathered([writing.sequence for writing in writings], policy)
            ordered = sorted(writings, key=lambda writing: batch.sequences.index(writing.sequence))
            budget = max(writing.left for writing in ordered)
            results = next_round(batch, policy, budget, [writing.copies for writing in ordered])
            cut = [writing.cut(result, policy) for writing, result in zip(ordered, results, strict=True)]
            turns = [cut[ordered.index(writing)] for writing in writings]
        self._pace.observe(writings[0].sequence.batch, [turn.result for turn in turns])
        return turns

    def _gathered(self, sequences: list[Sequence], policy: Depth) -> Batch:
        """The one batch of these texts."""
        batch = max((sequence.batch for sequence in sequences), key=lambda batch: len(batch.sequences))
        strangers = [sequence for sequence in batch.sequences if sequence not in sequences]
        changed = bool(strangers)
        batch.release(strangers)
        for sequence in sequences:
            if sequence.batch is not batch:
                sequence.batch.release([sequence])
                batch.join(sequence.batch)
                changed = True
        if changed:
            batch.rounds = 0
            policy.begin()
        return batch

    def _policy(self, rows: int, depth: int | str) -> Depth:
        """What is measured of so many texts at a time serves all that come in such a number."""
        drafter, key = self._pair.drafter, (rows, depth)
        if key not in self._policies or self._policies[key][0] is not drafter:  # a copy of a pair may have another one
            self._policies[key] = drafter, choose_depth(depth, drafter.limit)
        return self._policies[key][1]


def _fit(writings: list[Writing]) -> bool:
    """Whether texts can be rows of one batch: with the same drafter at the same depth, and of similar length.

    Every row takes the room of the longest, and attention looks at all of it.
    """
    sequences = [writing.sequence for writing in writings]
    kinds = {(id(writing.sequence.pair.drafter), writing.options.depth) for writing in writings}
    if len(kinds) > 1 or any(writing.solitary or not writing.sequence.ready for writing in writings):
        return False
    rows = [sequence.batch.cache.capacity for sequence in sequences]
    if len(set(rows)) == 1:
        return True
    if max(rows) > max(SHORT, UNLIKE * min(rows)):
        return False
    held = [sequence.nbytes for sequence in sequences]
    return max(held) * len(held) - sum(held) < memory.free_bytes()


class _Rate(NamedTuple):
    """Tokens and seconds, those of long ago counting less."""

    tokens: float = 0.0
    seconds: float = 0.0
    weight: float = 0.0
    rounds: int = 0

    def add(self, tokens: int, seconds: float) -> "_Rate":
        if self.rounds >= WARM_UP:  # a depth that is traced for the first time says nothing of those to come
            seconds = min(seconds, SLOW * self.seconds / self.weight)
        return _Rate(
            FADE * self.tokens + tokens, FADE * self.seconds + seconds, FADE * self.weight + 1, self.rounds + 1
        )

    @property
    def known(self) -> bool:
        return self.rounds >= TRIAL

    @property
    def pace(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Pace:
    """Tokens per second of so many texts together, and of one after the other, as measured on this machine."""

    rates: dict[int, _Rate] = field(default_factory=dict)  # 1: one after the other
    since: int = 0  # rounds since the way that does not pay was tried last

    def together(self, texts: int) -> bool:
        """Whether so many should be written together: what is not known is tried, first of all together."""
        joint, single = self.rates.get(texts, _Rate()), self.rates.get(1, _Rate())
        if not joint.known or not single.known:
            return not joint.known
        pays = joint.pace >= single.pace
        if self.since < RETRIAL:
            return pays
        loser = 1 if pays else texts
        self.rates[loser], self.since = _Rate(), 0  # anew: what made it lose may have been a hiccup, or tracing
        return not pays

    def observe(self, batch: Batch, results: list[Round | Exception]) -> None:
        """Learn of a round, once its like has been traced."""
        sound = [result for result in results if isinstance(result, Round)]
        if batch.rounds > WARM_UP and sound:
            self.add(len(batch.sequences), sum(len(result.tokens) for result in sound), sound[0].times.total)

    def add(self, texts: int, tokens: int, seconds: float) -> None:
        self.since += 1
        self.rates[texts] = self.rates.get(texts, _Rate()).add(tokens, seconds)
