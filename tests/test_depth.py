"""What drafting is worth is found out in a few rounds, followed, and never allowed to cost much: on simulated machines.

A simulation counts the tokens that are to be expected of what was chosen, not those that luck brought.
"""

import random
import re
from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

import pytest

from mtp_mlx.chances import CopyChance, DraftChances
from mtp_mlx.costs import ALLOWANCE, ENOUGH, FORGET_AFTER, SHARE, Budget, CostClass, Timings
from mtp_mlx.depth import (
    CHECK_ROUNDS,
    COPY_AT_MOST,
    COPY_SIZES,
    DEEPEST,
    PROBE_AFTER,
    Checked,
    Choice,
    Depth,
    Fixed,
    Measured,
    Outcome,
    Scheduled,
    choose_depth,
)
from mtp_mlx.errors import RequestError

# Plain steps of a forward over 1, 2, 3... rows, as others have published them; the last two are worst cases.
CURVES = {
    "flat": [1.0] * 9,
    "M5 Max": [1, 1.05, 1.09, 1.13, 1.22, 1.39, 1.56, 1.73, 1.95],  # mlxcel#1207, Gemma 12B
    "M4 Pro": [1, 1.1, 1.27, 1.45, 1.75, 2.0, 2.37, 2.75, 3.1],  # mlx 0.32 kernels
    "M1, affine": [1, 1.7, 2.36, 3.2, 3.9, 4.6, 5.3, 6.0, 6.7],  # mlxcel, Qwen 27B
    "row by row": [1.0 * rows for rows in range(1, 10)],  # matrix products bound by arithmetic, as on a CPU
    "stair": [1, 1.83, 1.85, 1.9, 1.95, 2.0, 2.05, 2.1, 2.2],
}
DRAFT, HOST = 0.066, 0.03  # plain steps of one draft, and of a drafted round's overhead


class Noise(NamedTuple):
    """What disturbs times: `jitter` either way; a share of `outliers`, five times too long; `spike` on first rounds.

    The first round of every width is that many times longer, as when it is compiled.
    """

    jitter: float = 0.0
    outliers: float = 0.0
    spike: float = 1.0


STEADY, JITTERY, RESTLESS, NOISY = Noise(), Noise(0.1), Noise(0.1, 0.02), Noise(0.1, 0.02, 50.0)


class Machine:
    """Plays rounds on a curve of costs, drafts being right with the chance `p`, constant or by the tokens so far.

    `copying` holds the chance that a copy is on offer and that a token of it is right.
    """

    def __init__(
        self,
        curve: str,
        p: float | Callable[[int], float],
        seed: int = 0,
        noise: Noise = STEADY,
        *,
        draft: float = DRAFT,
        copying: tuple[float, float] = (0.0, 0.0),
    ):
        self.curve, self.p, self.copying, self.draft = CURVES[curve], p, copying, draft
        self.noise = noise
        self.random = random.Random(seed)
        self.pace = 0.01  # seconds of a plain step
        self.tokens = 0
        self.steps = 0.0  # plain steps that the rounds cost, noise aside
        self.expected = 0.0  # tokens that were to be expected of them
        self.choices: list[Choice] = []
        self.seen: set[Choice] = set()

    def cost(self, k: int, copied: bool = False) -> float:
        beyond = max(0, k + 1 - len(self.curve))
        verify = self.curve[k - beyond] + beyond * (self.curve[-1] - self.curve[-2])
        return verify + (0.0 if copied or not k else self.draft * k + HOST)

    def chance(self) -> float:
        return self.p if isinstance(self.p, float) else self.p(self.tokens)

    def play(self, policy: Depth, tokens: int) -> "Machine":
        goal = self.tokens + tokens
        while self.tokens < goal:
            self.round(policy, goal - self.tokens - 1)
        return self

    def round(self, policy: Depth, most: int | None = None) -> Outcome:
        offer = 40 if self.random.random() < self.copying[0] else 0
        choice = policy.choose(offer, most)
        chance = self.copying[1] if choice.copied else self.chance()
        accepted = 0
        while accepted < choice.drafts and self.random.random() < chance:
            accepted += 1
        outcome = Outcome(choice.drafts, choice.copied, accepted, accepted > 0, self.seconds(choice))
        policy.observe(outcome)
        self.steps += self.cost(*choice)
        self.expected += sum(chance**i for i in range(choice.drafts + 1))
        self.tokens += accepted + 1
        self.choices.append(choice)
        return outcome

    def seconds(self, choice: Choice) -> float:
        seconds = self.pace * self.cost(*choice) * (1 + self.noise.jitter * self.random.uniform(-1, 1))
        seconds *= 5 if self.random.random() < self.noise.outliers else 1
        first = choice not in self.seen
        self.seen.add(choice)
        return seconds * (self.noise.spike if first else 1)

    @property
    def speed(self) -> float:
        """Against plain decoding, luck and compilation aside."""
        return self.expected / self.steps

    @property
    def depths(self) -> list[int]:
        return [choice.drafts for choice in self.choices]


def speed_of(curve: str, p: float, k: int) -> float:
    return sum(p**i for i in range(k + 1)) / Machine(curve, p).cost(k)


def best_speed(curve: str, p: float) -> float:
    return max(speed_of(curve, p, k) for k in range(DEEPEST + 1))


# Speed


@pytest.mark.parametrize("noise", [STEADY, NOISY], ids=["steady", "noisy"])
@pytest.mark.parametrize("curve", ["flat", "M5 Max", "M4 Pro", "M1, affine"])
@pytest.mark.parametrize("p", [0.6, 0.85])
def test_the_best_fixed_depth_is_nearly_matched(curve: str, p: float, noise: Noise) -> None:
    best = best_speed(curve, p)
    short = [Machine(curve, p, seed, noise).play(Measured(), 256).speed / best for seed in range(8)]
    long = [Machine(curve, p, seed, noise).play(Measured(), 1000).speed / best for seed in range(8)]
    assert mean(short) > 0.92 and min(short) > 0.85, "within 256 tokens"
    assert mean(long) > 0.955 and min(long) > 0.92, "within 1000 tokens"


@pytest.mark.parametrize("curve", ["flat", "M5 Max", "M4 Pro"])
def test_the_best_depth_is_reached_in_forty_rounds_and_kept(curve: str) -> None:
    for seed in range(8):
        machine, policy = Machine(curve, 0.85, seed, NOISY), Measured()
        for _ in range(240):
            machine.round(policy)
        good = [speed_of(curve, 0.85, k) > 0.92 * best_speed(curve, 0.85) for k in machine.depths]
        assert mean(good[40:]) > 0.9


def test_a_stair_is_climbed_although_its_first_step_does_not_pay() -> None:
    assert speed_of("stair", 0.85, 1) < 1 < speed_of("stair", 0.85, 7)
    assert mean(Machine("stair", 0.85, seed).play(Measured(), 1000).speed for seed in range(10)) > 1.5


@pytest.mark.parametrize("noise", [STEADY, RESTLESS], ids=["steady", "noisy"])
@pytest.mark.parametrize("curve", CURVES)
def test_a_drafter_that_is_never_right_costs_three_percent_at_most(curve: str, noise: Noise) -> None:
    for seed in range(6):
        for draft in (0.0, DRAFT):
            machine = Machine(curve, 0.0, seed, noise, draft=draft)
            assert machine.play(Checked(Measured()), 400).speed >= 0.97


@pytest.mark.parametrize("p", [0.3, 0.7, 0.9])
def test_where_rows_cost_as_much_as_tokens_nothing_is_drafted_for_long(p: float) -> None:
    speeds = [Machine("row by row", p, seed, NOISY).play(Checked(Measured()), 400).speed for seed in range(8)]
    assert mean(speeds) > 0.965 and min(speeds) > 0.94


def test_a_trial_that_cannot_pay_is_broken_off() -> None:
    """Two drafted rounds tell what a row costs here: not even drafts that are all right would be worth that."""
    for copying in (0.0, 1.0):
        machine, policy = Machine("row by row", 0.5, noise=JITTERY, copying=(copying, 0.9)), Measured()
        for _ in range(20):
            machine.round(policy)
        assert machine.choices == [Choice(0)] * 2 + [Choice(1)] * 2 + [Choice(0)] * 16


@pytest.mark.parametrize("curve", ["flat", "M5 Max", "M4 Pro", "M1, affine"])
def test_a_text_that_turns_hard_and_easy_again_is_followed(curve: str) -> None:
    def p(tokens: int) -> float:
        return 0.3 if 300 <= tokens < 600 else 0.9

    fixed = max(mean(Machine(curve, p, seed).play(Fixed(k), 900).speed for seed in range(6)) for k in range(8))
    auto = mean(Machine(curve, p, seed, JITTERY).play(Measured(), 900).speed for seed in range(6))
    assert auto > 0.99 * fixed


def test_drafting_comes_back_when_the_text_gets_easier() -> None:
    for seed in range(8):
        policy = Measured()
        Machine("M4 Pro", 0.05, seed).play(policy, 200)
        assert policy.k == 0
        Machine("M4 Pro", 0.9, seed).play(policy, 200)
        assert policy.k > 0


def test_probes_are_few_and_fewer_where_they_are_dear() -> None:
    shares = []
    for curve in ("M4 Pro", "row by row"):
        machine, policy = Machine(curve, 0.0), Measured()
        for _ in range(2000):
            machine.round(policy)
        drafted = [depth > 0 for depth in machine.depths]
        assert mean(drafted[:200]) < 0.1 and any(drafted[1000:])
        shares.append(mean(drafted[1000:]))
    assert 0.08 > shares[0] > shares[1] and shares[1] < 0.02


def test_a_machine_that_gets_slower_as_a_whole_keeps_its_depth_in_the_end() -> None:
    machine, policy = Machine("M4 Pro", 0.85, noise=JITTERY), Measured()
    machine.play(policy, 300)
    machine.pace *= 2
    machine.play(policy, 200)
    assert speed_of("M4 Pro", 0.85, policy.k) > 0.93 * best_speed("M4 Pro", 0.85)


def test_one_slow_round_does_not_change_the_depth() -> None:
    machine, policy = Machine("M5 Max", 0.9), Measured()
    machine.play(policy, 200)
    before = policy.k
    policy.observe(Outcome(before, False, before, True, 10.0))
    assert policy.k == before > 0


def test_a_hiccup_does_not_rule_a_depth_out_for_good() -> None:
    """Depth 8 is the best here; its samples were five times too slow and nothing would ever renew them."""
    policy = Measured()
    Machine("flat", 0.95).play(policy, 10)
    for _ in range(ENOUGH):
        policy.observe(Outcome(8, False, 8, True, 0.08))
    assert policy.k < 8
    machine = Machine("flat", 0.95)
    for _ in range(1000):
        machine.round(policy)
    assert speed_of("flat", 0.95, policy.k) > 0.95 * best_speed("flat", 0.95)


def test_no_new_width_is_compiled_for_the_last_tokens() -> None:
    machine, policy = Machine("flat", 0.9), Measured()
    machine.play(policy, 200)
    seen = set(machine.depths)
    assert policy.k > 3
    for most in range(policy.k):
        assert policy.choose(most=most).drafts in {depth for depth in seen if depth <= most}


# Copies


def test_copies_are_taken_where_they_pay_and_only_there() -> None:
    for curve, share in (("flat", 0.9), ("M5 Max", 0.8), ("row by row", 0.05)):
        machine = Machine(curve, 0.5, copying=(1.0, 0.97), noise=JITTERY).play(Measured(), 1500)
        copied = mean(choice.copied for choice in machine.choices)
        assert copied > share if share > 0.5 else copied < share
    assert Machine("flat", 0.5, copying=(1.0, 0.97)).play(Measured(), 1500).speed > 5


def test_copies_leave_the_drafter_its_better_rounds() -> None:
    machine = Machine("M5 Max", 0.85, copying=(1.0, 0.4), noise=JITTERY).play(Measured(), 1000)
    assert mean(choice.copied for choice in machine.choices) < 0.1
    assert machine.speed > 0.94 * best_speed("M5 Max", 0.85)


@pytest.mark.parametrize("curve", CURVES)
def test_copies_and_drafts_that_are_never_right_cost_little(curve: str) -> None:
    for seed in range(6):
        machine = Machine(curve, 0.0, seed, JITTERY, copying=(1.0, 0.0)).play(Checked(Measured()), 400)
        assert machine.speed > 0.96


def test_copies_work_without_a_drafter() -> None:
    policy = choose_depth("auto", 0)
    machine = Machine("M5 Max", 0.0, copying=(1.0, 0.97)).play(policy, 500)
    assert machine.speed > 2 and all(choice.copied or not choice.drafts for choice in machine.choices)


def test_a_copy_is_no_longer_than_offered_and_allowed() -> None:
    policy = Measured()
    Machine("flat", 0.5, copying=(1.0, 0.97)).play(policy, 500)
    assert policy.choose(40) == Choice(31, True)
    assert policy.choose(40, most=10) == Choice(7, True)
    assert policy.choose(4) == Choice(3, True)
    assert not policy.choose(2).copied and not policy.choose(0).copied
    assert policy.choose(40, most=0) == Choice(0)


def test_a_fixed_depth_takes_every_copy() -> None:
    assert Fixed(4).choose() == Choice(4)
    assert Fixed(4).choose(40) == Choice(COPY_AT_MOST, True)
    assert Fixed(4).choose(3) == Choice(3, True)
    assert Fixed(4).choose(40, most=5) == Choice(5, True)
    assert Fixed(4).choose(most=2) == Choice(2)
    assert Fixed(4).choose(40, most=0) == Choice(0)


# Without a clock


def test_without_a_clock_the_same_text_gives_the_same_rounds() -> None:
    def play(clock: random.Random) -> list[Choice]:
        policy, machine = Checked(Scheduled()), Machine("M4 Pro", 0.6, copying=(0.3, 0.8))
        for _ in range(400):
            choice = policy.choose(machine.random.choice([0, 0, 0, 20]))
            accepted = machine.random.randint(0, choice.drafts)
            policy.observe(Outcome(*choice, accepted, accepted > 0, clock.expovariate(1)))
            machine.choices.append(choice)
        return machine.choices

    assert play(random.Random(1)) == play(random.Random(2))
    assert len(set(play(random.Random(1)))) > 3


def test_without_a_clock_the_depth_follows_what_is_accepted() -> None:
    for p, depths in ((0.0, {0}), (0.5, {0, 1, 2}), (0.95, {5, 6, 7, 8})):
        Machine("M4 Pro", p).play(policy := Scheduled(), 600)
        assert policy.k in depths
    assert Machine("M4 Pro", 0.0).play(Scheduled(), 600).depths[-300:].count(0) > 280
    dear = Scheduled(row_cost=1.0)
    Machine("row by row", 0.8).play(dear, 600)
    assert dear.k == 0


def test_without_a_clock_drafting_comes_back_too() -> None:
    policy = Scheduled()
    Machine("M4 Pro", 0.0).play(policy, 200)
    assert policy.k == 0
    Machine("M4 Pro", 0.95).play(policy, 200)
    assert policy.k > 0


def test_without_a_clock_nothing_of_an_earlier_text_is_left() -> None:
    used = Scheduled()
    Machine("M4 Pro", 0.9, 1, copying=(0.5, 0.9)).play(used, 300)
    used.begin()
    assert used == Scheduled()


# More than one text


def test_costs_outlive_a_text_and_acceptance_partly() -> None:
    policy = Measured()
    Machine("M5 Max", 0.9, noise=JITTERY).play(policy, 400)
    depth = policy.k
    policy.begin()
    machine = Machine("M5 Max", 0.9, 1, JITTERY).play(policy, 200)
    assert machine.depths[:3] == [depth] * 3
    assert machine.speed > 0.95 * best_speed("M5 Max", 0.9)
    policy.begin()
    hard = Machine("M5 Max", 0.0, 2, JITTERY).play(policy, 100)
    assert hard.depths.index(0) < 20


def test_a_longer_text_that_slows_every_round_does_not_change_the_depth() -> None:
    for pace in (0.4, 1.0, 2.5):
        machine, policy = Machine("M4 Pro", 0.85, noise=JITTERY), Measured()
        machine.play(policy, 500)
        policy.begin()
        machine.pace *= pace
        later = machine.choices.copy()
        machine.play(policy, 200)
        depths = machine.depths[len(later) :]
        assert mean(speed_of("M4 Pro", 0.85, k) > 0.93 * best_speed("M4 Pro", 0.85) for k in depths) > 0.8


def test_a_new_text_gives_a_drafter_that_is_off_another_chance() -> None:
    policy = Measured()
    Machine("M4 Pro", 0.0).play(policy, 400)
    policy.begin()
    machine = Machine("M4 Pro", 0.9)
    for _ in range(PROBE_AFTER // 2):
        machine.round(policy)
    assert policy.k > 0


# Times, chances and the budget


def fed(*rounds: tuple[int, float], copied: bool = False) -> Timings:
    timings = Timings()
    for drafts, seconds in rounds:
        timings.add(drafts, copied and drafts > 0, seconds)
    return timings


def test_the_first_samples_of_a_width_count_by_their_minimum() -> None:
    assert not fed((0, 1.0)).known(0)
    assert fed((0, 50.0), (0, 1.1), (0, 1.0)).time(0) == 1.0


def test_one_sample_moves_a_time_little() -> None:
    calm = [(0, 1.0)] * 5
    assert 1.0 < fed(*calm, (0, 100.0)).time(0) <= 1.25
    assert 0.75 <= fed(*calm, (0, 0.01)).time(0) < 1.0
    assert fed(*calm, *[(0, 2.0)] * 30).time(0) == pytest.approx(2.0, rel=0.05), "but many do"


def test_a_round_right_after_a_change_of_width_can_only_lower_a_time() -> None:
    calm = [(0, 1.0)] * 5 + [(2, 1.5)] * 5
    assert fed(*calm, (0, 1.2)).time(0) == 1.0
    assert fed(*calm, (0, 1.2), (0, 1.2)).time(0) > 1.0
    assert fed(*calm, (0, 0.9)).time(0) < 1.0


def test_times_between_and_beyond_the_known_ones() -> None:
    timings = fed(*[(0, 1.0)] * 2, *[(2, 1.2)] * 2, *[(4, 1.8)] * 2)
    assert timings.time(1) == pytest.approx(1.1) and timings.time(3) == pytest.approx(1.5)
    assert timings.time(6) == pytest.approx(2.4), "as steep as the last stretch"
    assert fed(*[(0, 1.0)] * 2, *[(2, 2.0)] * 2, *[(4, 2.1)] * 2).time(8) == pytest.approx(3.2), "or as the whole"
    assert fed(*[(0, 1.0)] * 2, *[(1, 1.0)] * 2).time(5) > 1.1, "no row is for nothing"
    assert not timings.known(3) and timings.known(4)


def test_fewer_rows_cannot_take_longer() -> None:
    assert fed(*[(0, 5.0)] * 2, *[(1, 1.2)] * 2).time(0) == 1.2


def test_copies_are_taken_to_cost_no_more_than_drafts_until_they_are_measured() -> None:
    timings = fed(*[(0, 1.0)] * 2, *[(3, 1.5)] * 2)
    assert timings.time(3, copied=True) == 1.5 and timings.time(7, copied=True) > 1.5
    for _ in range(ENOUGH):
        timings.add(3, True, 1.3)
    assert timings.time(3, copied=True) == 1.3 and timings.time(3) == 1.5


def test_a_time_that_nothing_renews_is_forgotten() -> None:
    old = [(0, 1.0)] * 2 + [(3, 9.0)] * 2
    assert fed(*old, *[(1, 1.1)] * (FORGET_AFTER - 1)).known(3)
    timings = fed(*old, *[(1, 1.1)] * (FORGET_AFTER + 1))
    assert not timings.known(3) and timings.time(3) < 2
    assert timings.known(0), "plain decoding is what everything is held against"


def test_only_positions_that_were_reached_count() -> None:
    chances = DraftChances()
    for _ in range(200):
        chances.observe(3, 1)  # the first is right, the second wrong, the third never looked at
    assert chances.tokens(1) == pytest.approx(2, abs=0.05)
    assert chances.tokens(2) == pytest.approx(2, abs=0.2)
    assert chances.positions[2].tried == 0
    half = DraftChances()
    for i in range(400):
        half.observe(2, 2 if i % 2 else 0)  # the second is right whenever the first is
    assert half.tokens(2) == pytest.approx(1 + 0.5 + 0.5, abs=0.15)


def test_a_position_is_expected_to_be_like_the_one_before() -> None:
    chances = DraftChances()
    for _ in range(30):
        chances.observe(1, 1)
    assert chances.tokens(4) > 4.5
    chances.observe(4, 1)
    assert chances.tokens(4) > 3, "one miss at the far end rules nothing out"


def test_positions_that_are_no_longer_reached_follow_those_before_them() -> None:
    chances = DraftChances()
    for _ in range(40):
        chances.observe(4, 4)
    for _ in range(40):
        chances.observe(4, 0)
    first, both = chances.tokens(1) - 1, chances.tokens(2) - 1
    assert first < 0.2 and both / first - 1 < 0.6


def test_copied_tokens_count_one_by_one() -> None:
    chance = CopyChance()
    for _ in range(100):
        chance.observe(7, 7)
    assert chance.tokens(7) > 7
    for _ in range(10):
        chance.observe(7, 0)
    assert chance.tokens(7) < 4
    for _ in range(1000):
        chance.pass_by()
    assert chance.tokens(7) == pytest.approx(CopyChance().tokens(7), rel=0.05), "misses are forgotten"


def test_what_trials_may_lose_is_a_share_of_the_time_spent() -> None:
    budget = Budget()
    assert budget.affords(ALLOWANCE, 1.0) and not budget.affords(ALLOWANCE + 0.1, 1.0)
    budget.add(1000.0, ALLOWANCE)
    assert budget.affords(SHARE * 1000, 1.0) and not budget.affords(SHARE * 1001 + 0.1, 1.0)
    budget.add(1.0, -100.0)
    assert budget.lost == 0, "gains are not saved up"


def test_a_cost_class_knows_no_clock() -> None:
    costs = CostClass(row=0.2, draft=0.1)
    costs.add(3, False, 99.0)
    assert costs.time(0) == 1 and costs.time(3) == pytest.approx(1.9) and costs.time(3, True) == pytest.approx(1.6)


# Reasons, limits, errors


def test_reasons_are_plain_words_with_what_was_measured() -> None:
    policy = Measured()
    assert "too few rounds" in policy.reason()
    Machine("row by row", 0.5).play(policy, 100)
    pattern = r"a round with 1 draft costs 2\.1 plain steps here and \d+ % of first drafts are accepted"
    assert re.fullmatch(pattern, policy.reason())
    for _ in range(2 * FORGET_AFTER):
        policy.observe(Outcome(0, False, 0, False, 0.01))
    assert re.fullmatch(pattern, policy.reason()), "even if that was long ago"
    policy = Measured()
    Machine("M5 Max", 0.9).play(policy, 200)
    assert re.fullmatch(r"a round costs 1\.\d plain steps here and brings [34]\.\d tokens", policy.reason())
    assert Measured(0).reason() == "no drafter"
    assert Fixed(3).reason() == "set by the caller"
    scheduled = Scheduled()
    assert scheduled.reason() == "no drafts so far"
    Machine("M5 Max", 0.9).play(scheduled, 100)
    pattern = r"\d+ % of first drafts are accepted, and each is taken to cost 0\.30 plain steps"
    assert re.fullmatch(pattern, scheduled.reason())


@pytest.mark.parametrize("depth", [-1, 32, "fast", True, "3"])
def test_a_depth_that_means_nothing_is_refused(depth: int | str) -> None:
    with pytest.raises(RequestError, match="depth"):
        choose_depth(depth, 31)


@pytest.mark.parametrize("reproducible", [False, True])
def test_without_a_drafter_nothing_is_drafted(reproducible: bool) -> None:
    policy = choose_depth("auto", 0, reproducible)
    assert set(Machine("flat", 0.0).play(policy, 200).depths) == {0}
    assert policy.reason() in ("no drafter", "no drafts so far")
    assert choose_depth(0, 0).choose() == Choice(0)
    with pytest.raises(RequestError, match="needs a drafter"):
        choose_depth(2, 0)


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_drafter_with_a_low_limit_is_never_asked_for_more(reproducible: bool) -> None:
    machine = Machine("flat", 0.99).play(choose_depth("auto", 2, reproducible), 100)
    assert max(machine.depths) == 2


def test_nothing_is_drafted_while_the_drafter_is_not_ready() -> None:
    for policy in (Measured(), Scheduled(), Fixed(3), Checked(Measured())):
        for _ in range(5):
            assert policy.choose(most=0) == Choice(0)
            policy.observe(Outcome(0, False, 0, False, 0.01))


def test_a_drafter_that_is_kept_from_drafting_for_long_is_gone_back_to() -> None:
    machine, policy = Machine("M5 Max", 0.9), Checked(Measured())
    machine.play(policy, 200)
    for _ in range(2 * FORGET_AFTER):
        assert machine.round(policy, most=0).drafted == 0
    for _ in range(2 * PROBE_AFTER):
        machine.round(policy)
    assert policy.k > 0


def test_asking_changes_nothing() -> None:
    asked, watched = Checked(Measured()), Checked(Measured())
    machine, twin = Machine("M4 Pro", 0.6, copying=(0.2, 0.7)), Machine("M4 Pro", 0.6, copying=(0.2, 0.7))
    for _ in range(200):
        for offer in (0, 20):
            asked.choose(offer)
        machine.round(asked)
        twin.round(watched)
    assert machine.choices == twin.choices and asked == watched


# The check of a drafter


@pytest.mark.parametrize("policy", [1, 4])
def test_a_drafter_that_never_hits_is_given_up_and_the_reason_named(policy: int) -> None:
    machine, checked = Machine("M4 Pro", 0.0), choose_depth(policy, 31)
    machine.play(checked, 60)
    assert machine.depths == [policy] * CHECK_ROUNDS + [0] * (60 - CHECK_ROUNDS) and checked.k == 0
    assert checked.alarm == checked.reason()
    for cause in ("another checkpoint", "convention", "positions"):
        assert cause in checked.reason()


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_policy_that_stops_drafting_is_overruled_where_drafts_are_cheap(reproducible: bool) -> None:
    machine, checked = Machine("M5 Max", 0.0, noise=JITTERY), choose_depth("auto", 31, reproducible)
    machine.play(checked, 20)
    assert checked.choose(most=0) == Choice(0), "but not before the drafter is ready"
    machine.play(checked, 1000 if reproducible else 250)
    assert checked.alarm and machine.depths[-20:] == [0] * 20


def test_where_drafts_are_dear_the_judgement_comes_later_and_over_several_texts() -> None:
    checked = choose_depth("auto", 31)
    first = Machine("row by row", 0.0).play(checked, 400)
    assert checked.alarm is None and first.depths.count(1) < CHECK_ROUNDS // 2
    texts = 1
    while checked.alarm is None and texts < 10:
        checked.begin()
        assert Machine("row by row", 0.0, texts).play(checked, 400).speed > 0.97
        texts += 1
    assert checked.alarm and 2 <= texts < 10


def test_a_drafter_that_fits_is_not_given_up_even_on_a_hard_text() -> None:
    for seed in range(100):
        for policy in ("auto", 4):
            checked = choose_depth(policy, 31)
            Machine("M4 Pro", 0.3, seed).play(checked, 120)
            assert checked.alarm is None


def test_only_a_suspect_drafter_makes_the_check_disturb_a_policy() -> None:
    alone, watched = Machine("M5 Max", 0.8, 5), Machine("M5 Max", 0.8, 5)
    alone.play(Measured(), 300)
    watched.play(Checked(Measured()), 300)
    assert alone.choices == watched.choices


def test_copies_say_nothing_of_the_drafter_and_outlive_it() -> None:
    checked = choose_depth(4, 31)
    for _ in range(2 * CHECK_ROUNDS):
        checked.observe(Outcome(7, True, 0, False, 0.01))
    assert checked.alarm is None
    for _ in range(CHECK_ROUNDS):
        checked.observe(Outcome(4, False, 0, False, 0.01))
    assert checked.alarm and checked.choose() == Choice(0) and checked.choose(7) == Choice(7, True)
    assert max(COPY_SIZES) == 31


def test_a_depth_of_zero_is_never_overruled() -> None:
    assert Machine("flat", 0.0).play(choose_depth(0, 31), 50).depths == [0] * 50


def test_a_high_temperature_is_not_taken_for_a_drafter_that_does_not_fit() -> None:
    """Drafts name the most probable token and the sampler draws another: what is accepted says little then."""
    checked = choose_depth(4, 31)
    for _ in range(100):
        checked.observe(Outcome(*checked.choose(), 0, True, 0.01))
    assert checked.alarm is None and checked.k == 4
