"""How many tokens to draft next, decided by what drafting has been worth so far on this machine.

A depth k brings 1 + p1 + p1 p2 + ... tokens per round, with p_j the chance that draft j is right when those
before it were, and costs the measured time of such a round. The best ratio wins; depth 0, plain decoding, is always
a candidate. What is not in use is tried now and then, as long as all such trials together have cost no more than
a small share of the time spent: a drafter that is never right must not make a text slower.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from mtp_mlx.chances import CopyChance, DraftChances
from mtp_mlx.costs import ENOUGH, Budget, CostClass, Costs, Timings
from mtp_mlx.errors import RequestError

DEEPEST = 8  # what `auto` tries at most
COPY_SIZES = (3, 7, 15, 31)  # drafts of a copied round: 4 to 32 rows fill the tiles of matrix kernels; few to compile
COPY_AT_MOST = 15  # copied drafts at a fixed depth
GAIN = 1.03  # a change to more drafts must promise at least this
TRIAL = 3  # rounds of a trial at most, the first of them slower than usual
PROBE_AFTER, PROBE_AT_MOST = 32, 512  # rounds between probes of the depths not in use, doubling
PROBE_SHARE = 0.005  # of the time until the next probe that a probe may be expected to lose; they wait longer then
FAR = 4  # depth that is tried where depth 1 does not pay but drafts are right
REMEMBERED = 4.0  # drafts that all earlier ones count as, where a text has begun or drafting was off for long
ROW_COST, DRAFT_COST = 0.25, 0.05  # plain steps that a row and a draft are taken to cost where no clock may be read
CHECK_ROUNDS = 32  # rounds with drafts after which a drafter is judged: 32 drafts at depth 1, 128 at depth 4
CHECK_HITS = 2  # of them must have begun with the target's most probable token; a pair that fits has 10 on hard texts


class Choice(NamedTuple):
    """What the next round drafts."""

    drafts: int
    copied: bool = False  # taken from a copy of earlier text in place of the drafter


class Outcome(NamedTuple):
    """What a round came to."""

    drafted: int
    copied: bool
    accepted: int
    likely: bool  # whether the first draft was the target's most probable token, whatever was drawn
    seconds: float


class Depth(Protocol):
    """Chooses what each round drafts and learns from the outcome. May serve many texts, one after the other."""

    @property
    def k(self) -> int:
        """The depth in use, trials, probes and copies aside."""
        ...

    def begin(self) -> None:
        """Another text begins, for the same pair on the same machine."""
        ...

    def choose(self, copy: int = 0, most: int | None = None) -> Choice:
        """What to draft next; asking changes nothing.

        `copy` tokens could be copied from earlier text now, 0 where nothing matches. `most` is the largest number
        of drafts allowed, copied or not; 0 where the drafter is not ready.
        """
        ...

    def observe(self, *outcomes: Outcome) -> None:
        """Learn of a round, whether it was as chosen or not: what came of it for each text that it was of."""
        ...

    def spare(self) -> bool:
        """Whether a draft that was not chosen would stay within what trials may cost."""
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
    """Always the same number of drafts; where a copy is on offer, that copy, of up to COPY_AT_MOST tokens."""

    k: int
    why: str = "set by the caller"
    alarm: None = None

    def begin(self) -> None:
        """Nothing to forget."""

    def choose(self, copy: int = 0, most: int | None = None) -> Choice:
        wanted = min(copy, COPY_AT_MOST) or self.k
        drafts = wanted if most is None else min(wanted, most)
        return Choice(drafts, copied=copy > 0 < drafts)

    def observe(self, *outcomes: Outcome) -> None:
        """Nothing to learn."""

    def spare(self) -> bool:
        return False

    def reason(self) -> str:
        return self.why


class Trial(NamedTuple):
    """A depth that is being tried."""

    k: int
    rounds: int = 0


@dataclass
class Adaptive:
    """Follows the most expected tokens per time: chances as observed, times as `costs` has them."""

    deepest: int
    costs: Costs
    k: int = 0
    drafts: DraftChances = field(default_factory=DraftChances)
    copies: CopyChance = field(default_factory=CopyChance)
    budget: Budget = field(default_factory=Budget)
    trial: Trial | None = None
    wait: int = PROBE_AFTER  # rounds from one probe to the next
    since_probe: int = PROBE_AFTER  # so the first one comes as soon as plain decoding has been timed
    since_drafts: int = 0
    alarm: None = None

    def begin(self) -> None:
        self.costs.begin()
        self.drafts.remember(REMEMBERED)
        self.copies.remember(REMEMBERED)
        self.trial, self.wait = None, PROBE_AFTER
        self.since_probe = 0 if self.k else PROBE_AFTER

    def choose(self, copy: int = 0, most: int | None = None) -> Choice:
        most = max(self.deepest, copy) if most is None else most
        size = self._copy_size(min(copy, most))
        return Choice(size, copied=True) if size else Choice(self._depth(most))

    def _depth(self, most: int) -> int:
        wanted = self.trial.k if self.trial else self.k
        if wanted <= most:
            return wanted
        # A width that has never run would have to be compiled for the last few tokens of a text.
        return max((k for k in range(most + 1) if self.costs.known(k)), key=self.rate, default=0)

    def _copy_size(self, most: int) -> int:
        """How much of what could be copied is worth it; 0 where drafting or plain decoding promises more."""
        sizes = [size for size in COPY_SIZES if size <= min(most, self.costs.reach())]
        # A first trial of a single draft goes first: it tells what a row costs here.
        if not sizes or (self.trial and self.trial.k == 1 and not self.costs.known(1)):
            return 0
        best = max(sizes, key=self.copy_rate)
        drafting = max(self.rate(self.k), self.rate(self.trial.k) if self.trial else 0.0)
        # What is assumed of copies before any was seen may be bet on; what was seen of them is relied on.
        if self.copies.tokens(best, prior=0.0) > drafting * self.costs.time(best, copied=True):
            return max((size for size in sizes if size > best and self._worth_copying(size, best)), default=best)
        return best if self.copy_rate(best) > drafting and self._affords(0.0) else 0

    def _worth_copying(self, size: int, best: int) -> bool:
        """Whether a longer copy, not timed lately, might be better and is affordable if not: rows may come in tiles."""
        known, time = self.costs.known(size, copied=True), self.costs.time(size, copied=True)
        at_best = self.copies.tokens(size) / self.costs.at_best(size, copied=True)
        affordable = self._affords(time - self.copies.tokens(size) / self.rate(self.k))
        return not known and at_best > self.copy_rate(best) and affordable

    def observe(self, *outcomes: Outcome) -> None:
        drafted, copied, _, _, seconds = outcomes[0]
        accepted = [outcome.accepted for outcome in outcomes]
        self.costs.add(drafted, copied, seconds)
        self._charge(drafted, copied, sum(accepted) / len(accepted))
        self.copies.pass_by()
        if copied:
            for right in accepted:
                self.copies.observe(drafted, right)
        else:
            self._learn(drafted, accepted)
            self._proceed(drafted)

    def _charge(self, drafted: int, copied: bool, accepted: float) -> None:
        """Book a round. What it took above its rows one by one was compilation: paid once, and no trial's loss."""
        if not self.costs.known(0):
            return
        time = min(self.costs.time(drafted, copied), (drafted + 1) * self.costs.time(0))
        in_use = drafted == self.k and not copied
        self.budget.add(time, 0.0 if in_use else time - (accepted + 1) / self.rate(self.k))

    def _learn(self, drafted: int, accepted: list[int]) -> None:
        self.since_probe += 1
        self.since_drafts += 1
        if drafted:
            if self.since_drafts > PROBE_AFTER:
                self.drafts.remember(REMEMBERED)
            for right in accepted:
                self.drafts.observe(drafted, right)
            self.since_drafts = 0

    def _proceed(self, drafted: int) -> None:
        """Go on with a trial or end it; without one, see what to use and what to try."""
        if self.trial and self.trial.k == drafted:
            self.trial = self.trial._replace(rounds=self.trial.rounds + 1)
            if self._ended(self.trial):
                self.trial = None
        if self.trial is None and self.costs.known(0):
            self._decide()

    def _ended(self, trial: Trial) -> bool:
        if not self._affords(0.0):
            return True
        if trial.rounds < ENOUGH:
            return False
        steps = self.costs.time(trial.k) / self.costs.time(0)
        # Not even drafts that are all right would make it worth its time, and that time is no hiccup.
        hopeless = trial.k + 1 < self.rate(self.k) * self.costs.time(trial.k) and steps < 1.25 * (trial.k + 1)
        return hopeless or self._better(trial.k) or trial.rounds >= TRIAL

    def _better(self, k: int) -> bool:
        """Whether a depth promises enough to change to it; to plain decoding, anything does."""
        return k != self.k and self.rate(k) > (GAIN if k else 1.0) * self.rate(self.k)

    def _decide(self) -> None:
        best = max(range(min(self.deepest, self.costs.reach()) + 1), key=self.rate)
        if self._better(best):
            if self.costs.known(best):
                self.k, self.since_probe, self.wait = best, 0, PROBE_AFTER
            elif self._affords(self._loss(best)):
                self.trial = Trial(best)
        elif self.since_probe >= self.wait:
            self._probe(*((self.k + 1, self.k - 1, 0) if self.k else (1,)))
        elif self.k == 0 and self.since_drafts == 0 and not self.costs.known(FAR):
            self._probe(FAR)  # a curve may be a stair, dear at depth 1 and no dearer beyond

    def _probe(self, *depths: int) -> None:
        """Try what has not been timed for longest, if it might be better and a failure is affordable."""
        for k in sorted(depths, key=self.costs.age, reverse=True):
            if k <= self.deepest and self._conceivable(k) and self._affords(ENOUGH * self._loss(k)):
                dear = int(ENOUGH * self._loss(k) / (PROBE_SHARE * self.costs.time(0)))
                self.trial, self.since_probe = Trial(k), 0
                self.wait = max(PROBE_AFTER, min(2 * self.wait, PROBE_AT_MOST, dear))
                return

    def _conceivable(self, k: int) -> bool:
        """Whether a depth might be better: at the lowest time it may have, and with first drafts right once more."""
        tokens = 2.0 if self.k == 0 and k == 1 else self.drafts.tokens(k)
        return tokens > GAIN * self.rate(self.k) * self.costs.at_best(k)

    def _loss(self, k: int) -> float:
        """What a round at another depth is expected to lose; no more than its rows one by one cost."""
        time = min(self.costs.time(k), (k + 1) * self.costs.time(0))
        return max(0.0, time - self.drafts.tokens(k) / self.rate(self.k))

    def _affords(self, loss: float) -> bool:
        return self.budget.affords(loss, self.costs.time(0))

    def spare(self) -> bool:
        return self.trial is None and self.costs.known(1) and self._affords(self._loss(1))

    def rate(self, k: int) -> float:
        """Expected tokens per unit of time with k drafts."""
        return self.drafts.tokens(k) / self.costs.time(k)

    def copy_rate(self, size: int) -> float:
        """The same with so many copied tokens."""
        return self.copies.tokens(size) / self.costs.time(size, copied=True)


class Measured(Adaptive):
    """Follows the most tokens per second, as measured on this machine."""

    def __init__(self, deepest: int = DEEPEST):
        self.timings = Timings()
        super().__init__(deepest, self.timings)

    def reason(self) -> str:
        if not self.deepest:
            return "no drafter"
        seconds, first = self.timings.measured(), self.drafts.first()
        drafted = [k for k in seconds if k]
        k = self.k or max(drafted, key=lambda k: self.drafts.tokens(k) / seconds[k], default=0)
        if k not in drafted or first is None:
            return "still comparing depths: too few rounds so far"
        steps = seconds[k] / seconds[0]
        if self.k:
            return f"a round costs {steps:.1f} plain steps here and brings {self.drafts.tokens(k):.1f} tokens"
        drafts = "1 draft" if k == 1 else f"{k} drafts"
        share = f"{100 * first:.0f} % of first drafts are accepted"
        return f"a round with {drafts} costs {steps:.1f} plain steps here and {share}"


class Scheduled(Adaptive):
    """The same without a clock: what is drafted follows from the text alone, so that a run can be repeated.

    `row_cost` and `draft_cost` are what one more row of a block and one draft are taken to cost, in plain steps.
    Where they cost more, this policy can be slower than plain decoding; only `Measured` would notice.
    """

    def __init__(self, deepest: int = DEEPEST, row_cost: float = ROW_COST, draft_cost: float = DRAFT_COST):
        super().__init__(deepest, CostClass(row_cost, draft_cost))

    def begin(self) -> None:
        """Forget everything: nothing of an earlier text may have a say in this one."""
        super().begin()
        self.k, self.drafts, self.copies, self.budget = 0, DraftChances(), CopyChance(), Budget()
        self.since_probe, self.since_drafts = PROBE_AFTER, 0

    def reason(self) -> str:
        first = self.drafts.first()
        if first is None:
            return "no drafts so far"
        steps = self.costs.time(1) - self.costs.time(0)
        return f"{100 * first:.0f} % of first drafts are accepted, and each is taken to cost {steps:.2f} plain steps"


@dataclass
class Checked:
    """A policy, and a judgement of the drafter by its first rounds: one that almost never hits does not fit.

    A hit is a first draft that is the target's most probable token, so a high temperature does not look like a fault.
    Nothing else tells of a head read in the wrong convention or made for another checkpoint: the text stays right.
    Rounds are counted over all texts. A policy that has stopped drafting is overruled, one draft at a time, while its
    budget for trials has room: where drafts are dear the judgement comes late, but no text pays for it.
    """

    policy: Depth
    rounds: int = 0  # with drafts of the drafter's own
    hits: int = 0  # of those, how many began with the target's most probable token

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

    def begin(self) -> None:
        self.policy.begin()

    def choose(self, copy: int = 0, most: int | None = None) -> Choice:
        choice = self.policy.choose(copy, most)
        if self.alarm:
            return choice if choice.copied else Choice(0)
        suspect = 0 < self.rounds < CHECK_ROUNDS and self.hits < CHECK_HITS
        overruled = suspect and not choice.drafts and most != 0 and self.policy.spare()
        return Choice(1) if overruled else choice

    def observe(self, *outcomes: Outcome) -> None:
        for outcome in outcomes:
            if outcome.drafted and not outcome.copied and self.rounds < CHECK_ROUNDS:
                self.rounds, self.hits = self.rounds + 1, self.hits + outcome.likely
        self.policy.observe(*outcomes)

    def spare(self) -> bool:
        return not self.alarm and self.policy.spare()

    def reason(self) -> str:
        return self.alarm or self.policy.reason()


def choose_depth(depth: int | str, limit: int, reproducible: bool = False) -> Depth:
    """The policy a user means by a number or "auto", for a drafter of at most `limit` drafts; 0 if there is none.

    A `reproducible` "auto" reads no clock; make a new one for each text. Raises RequestError for anything else.
    """
    if depth == "auto":
        deepest = min(DEEPEST, limit)
        return Checked(Scheduled(deepest) if reproducible else Measured(deepest))
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise RequestError(f'depth {depth!r} is neither "auto" nor a number of drafts')
    if depth < 0:
        raise RequestError(f"depth {depth} is negative; give 0 to turn drafting off")
    if limit == 0 and depth > 0:
        raise RequestError(f"depth {depth} needs a drafter and there is none; give --drafter or use depth 0")
    if depth > limit:
        raise RequestError(f"depth {depth} is more than this drafter's limit of {limit}")
    return Checked(Fixed(depth)) if depth else Fixed(0)
