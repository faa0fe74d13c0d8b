"""How many tokens to draft next, decided by what drafting has been worth so far on this machine.

A depth k brings 1 + p1 + p1 p2 + ... tokens per round, with p_j the chance that draft j is right when those
before it were, and costs the measured time of such a round. The best ratio wins; depth 0 is always a candidate.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

from mtp_mlx.errors import RequestError

DEEPEST = 6  # what `auto` tries at most
TRIAL = 4  # depth of the first trial and of later probes while drafting is off
SAMPLES = 3  # rounds at each depth before it is judged, the first of them not counted
PRIOR = 8  # drafts that the expectation from the position before is worth
GAIN = 1.03  # a change must promise at least this
FORGET_AFTER = 128  # rounds
PROBE_AFTER, PROBE_AT_MOST = 32, 512  # rounds between probes of the depths not in use, doubling
CHECK_ROUNDS = 32  # rounds with drafts after which a drafter is judged: 32 drafts at depth 1, 128 at depth 4
CHECK_HITS = 2  # of them must have begun with the target's most probable token; a pair that fits has 10 on hard texts


class Depth(Protocol):
    """Chooses the number of drafts of each round and learns from the outcome."""

    @property
    def k(self) -> int:
        """The depth in use, trials and probes of others aside."""
        ...

    def choose(self) -> int: ...

    def observe(self, drafted: int, accepted: int, likely: bool, seconds: float) -> None:
        """Learn of a round; `likely` says whether its first draft was the target's most probable token."""
        ...

    @property
    def alarm(self) -> str | None:
        """Why drafting was given up for good, if it was, and what may be wrong."""
        ...

    def reason(self) -> str:
        """Why the present depth was chosen, for people."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always the same number of drafts."""

    k: int
    why: str = "set by the caller"
    alarm: None = None

    def choose(self) -> int:
        return self.k

    def observe(self, drafted: int, accepted: int, likely: bool, seconds: float) -> None:
        """Nothing to learn."""

    def reason(self) -> str:
        return self.why


@dataclass
class Cost:
    """Seconds per round at one depth: the first sample is dropped, then a slow average that outliers barely move."""

    seen: int = 0
    seconds: float = 0.0
    latest: int = 0  # number of the round that was last measured

    def add(self, seconds: float, number: int) -> None:
        self.seen, self.latest = self.seen + 1, number
        if self.seen <= 2:
            self.seconds = seconds
        elif self.seen <= SAMPLES:
            self.seconds = min(self.seconds, seconds)
        else:
            bounded = min(max(seconds, 0.75 * self.seconds), 1.25 * self.seconds)
            self.seconds += 0.2 * (bounded - self.seconds)


@dataclass
class Measured:
    """Tries depth 0 and a trial depth, then follows the best measured tokens per second."""

    deepest: int = DEEPEST
    k: int = 0
    costs: dict[int, Cost] = field(default_factory=dict)
    tried: list[float] = field(default_factory=list)  # decayed count of drafts judged at each position
    right: list[float] = field(default_factory=list)  # of those, how many were accepted
    plan: list[int] = field(default_factory=list)  # depths still to be tried, next one last
    wait: int = PROBE_AFTER
    since_probe: int = 0
    number: int = 0  # rounds so far
    alarm: None = None

    def __post_init__(self) -> None:
        self.plan = [self.trial] * SAMPLES + [0] * SAMPLES

    @property
    def trial(self) -> int:
        """The depth that stands for drafting while drafting is off."""
        return min(TRIAL, self.deepest)

    def choose(self) -> int:
        return self.plan[-1] if self.plan else self.k

    def observe(self, drafted: int, accepted: int, likely: bool, seconds: float) -> None:
        self.number += 1
        self.costs.setdefault(drafted, Cost()).add(seconds, self.number)
        self._count(drafted, accepted)
        if self.plan:
            self.plan.pop()
        else:
            self.since_probe += 1
        if not self.plan:
            self._decide()

    def _count(self, drafted: int, accepted: int) -> None:
        """Only the positions that were reached say anything: all accepted ones and the first rejected."""
        for j in range(min(accepted + 1, drafted)):
            if j == len(self.tried):
                self.tried.append(0.0)
                self.right.append(0.0)
            self.tried[j] = 0.98 * self.tried[j] + 1
            self.right[j] = 0.98 * self.right[j] + (j < accepted)

    def _decide(self) -> None:
        best = max(range(self.deepest + 1), key=self.tokens_per_second)
        if best != self.k and self.tokens_per_second(best) > GAIN * self.tokens_per_second(self.k):
            self.k, self.since_probe, self.wait = best, 0, PROBE_AFTER
        if self.since_probe >= self.wait:
            # Two rounds, as the first after a change of depth may pay for buffers of another shape.
            self.plan = [0, 0] if self.k else [self.trial] * 2
            self.since_probe, self.wait = 0, min(2 * self.wait, PROBE_AT_MOST)

    def tokens_per_round(self, k: int) -> float:
        """Expected tokens of a round with k drafts.

        A position is taken to be like the one before it until enough drafts have reached it: a few unlucky ones
        at the far end would otherwise keep that depth from ever being tried again.
        """
        total, reached, chance, prior = 1.0, 1.0, 0.5, 1.0
        for j in range(k):
            tried, right = (self.tried[j], self.right[j]) if j < len(self.tried) else (0.0, 0.0)
            chance = (right + prior * chance) / (tried + prior)
            prior = PRIOR
            reached *= chance
            total += reached
        return total

    def seconds(self, k: int) -> float:
        """Cost of a round with k drafts, on the line through the nearest depths measured where k itself was not."""
        known = sorted(depth for depth, cost in self.costs.items() if cost.seen > 1 and self._trusted(depth, cost))
        if k in known:
            return self.costs[k].seconds
        if len(known) < 2:
            return math.inf
        low = max((depth for depth in known[:-1] if depth < k), default=known[0])
        high = min(depth for depth in known if depth > low)
        slope = (self.costs[high].seconds - self.costs[low].seconds) / (high - low)
        return self.costs[low].seconds + slope * (k - low)

    def _trusted(self, depth: int, cost: Cost) -> bool:
        """A figure that nothing will ever renew is forgotten: one hiccup must not rule a depth out for good."""
        renewed = depth in (0, self.k, self.trial)
        return renewed or self.number - cost.latest <= FORGET_AFTER

    def tokens_per_second(self, k: int) -> float:
        return self.tokens_per_round(k) / max(self.seconds(k), 1e-9)

    def reason(self) -> str:
        trial = self.k or self.trial
        steps = self.seconds(trial) / self.seconds(0)
        if not math.isfinite(steps):
            return "still comparing depths: too few rounds so far"
        return (
            f"a round with {trial} drafts costs {steps:.1f} plain steps here "
            f"and brings {self.tokens_per_round(trial):.1f} tokens"
        )


@dataclass
class Checked:
    """A policy, and a judgement of the drafter by its first rounds: one that almost never hits does not fit.

    A hit is a first draft that is the target's most probable token, so a high temperature does not look like a fault.
    Nothing else tells of a head read in the wrong convention or made for another checkpoint: the text stays right.
    A policy that stops drafting early is overruled, one draft at a time and unbeknown to it, until it is made.
    """

    policy: Depth
    rounds: int = 0  # with drafts
    hits: int = 0  # of those, how many began with the target's most probable token
    overruled: bool = False  # whether the next round drafts against the policy's choice

    @property
    def k(self) -> int:
        return 0 if self.alarm else self.policy.k

    @property
    def alarm(self) -> str | None:
        if self.rounds < CHECK_ROUNDS or self.hits >= CHECK_HITS:
            return None
        return (
            f"only {self.hits} of the first {self.rounds} drafts named the target's most probable token, so drafting "
            "is off: the drafter does not fit this target; it may have been made for another checkpoint, its norms may "
            "be stored in another convention than its file's format shows, or its positions may be off"
        )

    def choose(self) -> int:
        if self.alarm:
            return 0
        k = self.policy.choose()
        self.overruled = k == 0 and 0 < self.rounds < CHECK_ROUNDS and self.hits < CHECK_HITS
        return 1 if self.overruled else k

    def observe(self, drafted: int, accepted: int, likely: bool, seconds: float) -> None:
        if drafted and self.rounds < CHECK_ROUNDS:
            self.rounds, self.hits = self.rounds + 1, self.hits + likely
        if not self.overruled:
            self.policy.observe(drafted, accepted, likely, seconds)

    def reason(self) -> str:
        return self.alarm or self.policy.reason()


def choose_depth(depth: int | str, limit: int) -> Depth:
    """The policy a user means by a number or "auto". Raises RequestError for anything else."""
    if depth == "auto":
        return Checked(Measured(min(DEEPEST, limit))) if limit else Fixed(0, "no drafter")
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise RequestError(f'depth {depth!r} is neither "auto" nor a number of drafts')
    if depth < 0:
        raise RequestError(f"depth {depth} is negative; give 0 to turn drafting off")
    if limit == 0 and depth > 0:
        raise RequestError(f"depth {depth} needs a drafter and there is none; give --drafter or use depth 0")
    if depth > limit:
        raise RequestError(f"depth {depth} is more than this drafter's limit of {limit}")
    return Checked(Fixed(depth)) if depth else Fixed(0)
