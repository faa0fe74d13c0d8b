"""What a round costs by what it drafts: taken for granted, or measured on this machine; and what trials may lose."""

import math
from dataclasses import dataclass, field
from typing import Protocol

FIRST_SAMPLES = 3  # rounds of a width whose minimum is taken: the first ones trace, compile and grow buffers
ENOUGH = 2  # rounds of a width before its time is believed
SMOOTHING, BOUND = 0.2, 0.25  # later samples move a time by a fifth of what they differ, taken as a quarter at most
FORGET_AFTER = 128  # rounds after which a time that nothing has renewed is not believed any more
HALF = 0.5  # of its last time is what plain decoding may cost at best, where it has not been timed for long
LEAST_ROW, ROW_UNKNOWN = 0.05, 0.5  # plain steps that a row costs at least, and before any was measured
FIRST_REACH = 1  # drafts
FURTHEST = 31  # most drafts of a round
ALLOWANCE = 3.0  # plain steps that trials may lose before anything is known
SHARE = 0.015  # of all time that trials may lose


class Costs(Protocol):
    """Time of a round by what it drafts. The unit is the implementation's own; only ratios matter."""

    def begin(self) -> None:
        """Another text begins."""
        ...

    def add(self, drafts: int, copied: bool, seconds: float) -> None: ...

    def time(self, drafts: int, copied: bool = False) -> float:
        """Expected time of such a round; infinite where nothing tells it."""
        ...

    def at_best(self, drafts: int, copied: bool = False) -> float:
        """The time as low as it may be, for all that is known."""
        ...

    def known(self, drafts: int, copied: bool = False) -> bool:
        """Whether the time of just such a round is known."""
        ...

    def age(self, drafts: int) -> float:
        """Rounds since so many drafts were last timed; infinite where that has hardly been done."""
        ...

    def reach(self) -> int:
        """The most drafts that what is known says anything about."""
        ...


@dataclass(frozen=True)
class CostClass:
    """Times that are taken for granted, in plain steps: no clock has any say."""

    row: float  # of one more row in a block
    draft: float  # of one draft

    def begin(self) -> None:
        """Nothing to forget."""

    def add(self, drafts: int, copied: bool, seconds: float) -> None:
        """Nothing to learn."""

    def time(self, drafts: int, copied: bool = False) -> float:
        return 1 + drafts * (self.row if copied else self.row + self.draft)

    def at_best(self, drafts: int, copied: bool = False) -> float:
        return self.time(drafts, copied)

    def known(self, drafts: int, copied: bool = False) -> bool:
        return True

    def age(self, drafts: int) -> float:
        return 0

    def reach(self) -> int:
        return FURTHEST


@dataclass
class Time:
    """Seconds of a round of one width, from its samples so far."""

    seconds: float = math.inf
    samples: int = 0
    latest: int = 0  # number of the round that was last measured

    def add(self, seconds: float, number: int, settled: bool) -> None:
        """Learn of a round; right after a change of width (not `settled`) it can only have been slower than usual."""
        self.samples, self.latest = self.samples + 1, number
        if self.samples <= FIRST_SAMPLES:
            self.seconds = min(self.seconds, seconds)
        elif settled or seconds < self.seconds:
            bounded = min(max(seconds, (1 - BOUND) * self.seconds), (1 + BOUND) * self.seconds)
            self.seconds += SMOOTHING * (bounded - self.seconds)


Curve = dict[int, float]  # seconds by drafts, both rising; the widths that are known


@dataclass
class Timings:
    """Times measured on this machine, in seconds."""

    times: dict[tuple[int, bool], Time] = field(default_factory=dict)  # by drafts and whether they were copied
    drafted: Curve = field(default_factory=dict)
    copied: Curve = field(default_factory=dict)
    number: int = 0  # rounds so far
    newest: tuple[int, bool] | None = None  # the last round's width
    paces: list[float] | None = None  # of a text's first rounds: seconds by what was expected of them

    def begin(self) -> None:
        self.newest, self.paces = None, [] if self.times else None

    def add(self, drafts: int, copied: bool, seconds: float) -> None:
        width = (drafts, copied)
        time = self.times.setdefault(width, Time())
        settled, self.newest = width == self.newest, width
        self.number += 1
        if self.paces is not None and time.samples >= ENOUGH:
            self._pace(seconds / time.seconds)
        else:
            time.add(seconds, self.number, settled)
        self.drafted, self.copied = self._curve(False), self._curve(True)

    def _pace(self, pace: float) -> None:
        """A text of another length changes the time of every width: its first rounds tell by how much."""
        assert self.paces is not None
        self.paces.append(pace)
        if len(self.paces) == FIRST_SAMPLES:
            for time in self.times.values():
                time.seconds *= min(self.paces)
            self.paces = None

    def _curve(self, copied: bool) -> Curve:
        """The widths whose times are believed. Fewer rows cannot take longer: where they did, it was a hiccup."""
        widths = [(0, False), *sorted(width for width in self.times if width[0] and width[1] == copied)]
        seconds = {drafts: self.times[drafts, of].seconds for drafts, of in widths if self._believed((drafts, of))}
        least = math.inf
        for drafts in reversed(seconds):
            least = seconds[drafts] = min(least, seconds[drafts])
        return seconds

    def _believed(self, width: tuple[int, bool]) -> bool:
        """A time that nothing has renewed for long is forgotten: one hiccup must not rule a width out for good."""
        time = self.times.get(width, Time())
        return time.samples >= ENOUGH and (width[0] == 0 or self.number - time.latest <= FORGET_AFTER)

    def time(self, drafts: int, copied: bool = False) -> float:
        """On a line through the nearest known widths where this one is not; copies cost no more than drafts."""
        drafted = _on_line(self.drafted, drafts)
        if not copied or len(self.copied) < 2:
            return drafted
        time = _on_line(self.copied, drafts)
        return time if drafts in self.copied else min(time, drafted)

    def at_best(self, drafts: int, copied: bool = False) -> float:
        """What is known of it, and what is known of fewer drafts where nothing is: a curve may be a stair."""
        if drafts == 0:
            return self.time(0) * (HALF if self.age(0) > FORGET_AFTER else 1)
        if self.known(drafts, copied):
            return self.time(drafts, copied)
        curve = self.copied if copied and len(self.copied) > 1 else self.drafted
        return max((curve[n] for n in curve if n < drafts), default=math.inf)

    def measured(self) -> Curve:
        """Seconds by drafts of all rounds that were not copied, however long ago they were timed."""
        timed = (width for width, time in self.times.items() if not width[1] and time.samples >= ENOUGH)
        return {width[0]: self.times[width].seconds for width in timed}

    def known(self, drafts: int, copied: bool = False) -> bool:
        return drafts in (self.copied if copied else self.drafted)

    def age(self, drafts: int) -> float:
        time = self.times.get((drafts, False), Time())
        return self.number - time.latest if time.samples >= FIRST_SAMPLES else math.inf

    def reach(self) -> int:
        """Twice as far as has been measured, so that the curve is climbed in few steps and none is a leap."""
        return 2 * max([FIRST_REACH, *self.drafted, *self.copied]) + 1


def _on_line(curve: Curve, drafts: int) -> float:
    """Seconds at `drafts`, between two known widths or beyond the last one.

    Beyond, the steeper of the last stretch and the whole curve goes on: cost tends to bend upwards.
    """
    if drafts in curve:
        return curve[drafts]
    if not curve:
        return math.inf
    known = list(curve)
    last = known[-1]
    if drafts > last:
        slopes = [(curve[last] - curve[n]) / (last - n) for n in known[:1] + known[-2:-1] if n != last]
        slope = max([*slopes, LEAST_ROW * curve[known[0]]]) if slopes else ROW_UNKNOWN * curve[last]
        return curve[last] + slope * (drafts - last)
    low, high = max(n for n in known if n < drafts), min(n for n in known if n > drafts)
    return curve[low] + (curve[high] - curve[low]) * (drafts - low) / (high - low)


@dataclass
class Budget:
    """Time spent so far and what of it was lost to trials, in the unit of the costs."""

    spent: float = 0.0
    lost: float = 0.0

    def add(self, time: float, loss: float) -> None:
        """Book a round. What a trial gains makes up for earlier losses and is not saved for later ones."""
        self.spent, self.lost = self.spent + time, max(0.0, self.lost + loss)

    def affords(self, loss: float, step: float) -> bool:
        """Whether so much more may be lost; `step` is the time of a plain round."""
        return self.lost + loss <= ALLOWANCE * step + SHARE * self.spent
