"""The depth that brings the most tokens per second is found, kept, and left when it stops paying."""

import random
import re

import pytest

from mtp_mlx.depth import CHECK_ROUNDS, DEEPEST, SAMPLES, Checked, Depth, Fixed, Measured, choose_depth
from mtp_mlx.errors import RequestError


class Machine:
    """Plays rounds at given costs and chances: row j of a block costs `row` plain steps, a draft is right with p."""

    def __init__(self, row: float, p: float, seed: int = 0):
        self.row, self.p = row, p
        self.random = random.Random(seed)
        self.seconds, self.tokens, self.depths = 0.0, 0, []  # type: ignore[var-annotated]

    def play(self, policy: Depth, rounds: int) -> None:
        for _ in range(rounds):
            k = policy.choose()
            accepted = 0
            while accepted < k and self.random.random() < self.p:
                accepted += 1
            spent = 0.01 * (1 + self.row * k) * self.random.uniform(0.97, 1.03)
            policy.observe(k, accepted, accepted > 0, spent)
            self.seconds += spent
            self.tokens += accepted + 1
            self.depths.append(k)


def best_depth(row: float, p: float) -> int:
    return max(range(DEEPEST + 1), key=lambda k: sum(p**i for i in range(k + 1)) / (1 + row * k))


@pytest.mark.parametrize(("row", "p"), [(1.0, 0.9), (0.5, 0.3), (0.9, 0.5)])
def test_drafting_is_off_where_it_does_not_pay(row: float, p: float) -> None:
    machine, policy = Machine(row, p), Measured()
    machine.play(policy, 600)
    assert best_depth(row, p) == 0 and policy.k == 0
    assert machine.depths[-300:].count(0) > 280
    assert machine.tokens / machine.seconds > 0.93 * 100, "100 tokens per second is plain decoding"


@pytest.mark.parametrize(("row", "p"), [(0.05, 0.8), (0.15, 0.7), (0.1, 0.95), (0.3, 0.8)])
def test_the_best_depth_is_found_within_a_few_percent(row: float, p: float) -> None:
    machine, policy = Machine(row, p), Measured()
    machine.play(policy, 600)
    k = best_depth(row, p)
    ideal = sum(p**i for i in range(k + 1)) / (1 + row * k) * 100
    assert k > 0 and policy.k > 0
    assert machine.tokens / machine.seconds > 0.93 * ideal


def test_drafting_comes_back_when_the_text_gets_easier() -> None:
    policy = Measured()
    Machine(0.2, 0.05).play(policy, 200)
    assert policy.k == 0
    Machine(0.2, 0.95).play(policy, 600)
    assert policy.k > 0


def test_one_slow_round_does_not_change_the_depth() -> None:
    policy = Measured()
    Machine(0.1, 0.8).play(policy, 100)
    before = policy.k
    policy.observe(before, before, True, 10.0)
    assert policy.k == before > 0


def test_a_hiccup_does_not_rule_a_depth_out_for_good() -> None:
    """Depth 6 is the best here; its one early sample was five times too slow and nothing would ever renew it."""
    policy = Measured()
    Machine(0.05, 0.9).play(policy, 2 * SAMPLES)
    for _ in range(2):
        policy.observe(6, 6, True, 5 * 0.01 * 1.3)
    assert policy.k < 6
    machine = Machine(0.05, 0.9)
    machine.play(policy, 600)
    assert policy.k == 6 and machine.depths[-200:].count(6) > 150


def test_reasons_are_plain_words() -> None:
    policy = Measured()
    assert "too few rounds" in policy.reason()
    Machine(1.0, 0.5).play(policy, 100)
    assert re.match(
        r"a round with 4 drafts costs (4\.9|5\.\d) plain steps here and brings \d\.\d tokens", policy.reason()
    )
    assert Fixed(3).reason() == "set by the caller"


@pytest.mark.parametrize("depth", [-1, 32, "fast", True, "3"])
def test_a_depth_that_means_nothing_is_refused(depth: int | str) -> None:
    with pytest.raises(RequestError, match="depth"):
        choose_depth(depth, 31)


def test_without_a_drafter_nothing_is_drafted() -> None:
    assert choose_depth("auto", 0).choose() == 0
    assert choose_depth("auto", 0).reason() == "no drafter"
    assert choose_depth(0, 0).choose() == 0
    with pytest.raises(RequestError, match="needs a drafter"):
        choose_depth(2, 0)


def test_a_drafter_with_a_low_limit_is_never_asked_for_more() -> None:
    policy = choose_depth("auto", 2)
    machine = Machine(0.01, 0.99)
    machine.play(policy, 100)
    assert max(machine.depths) == 2


@pytest.mark.parametrize("policy", ["auto", 1, 4])
def test_a_drafter_that_never_hits_is_given_up_and_the_reason_named(policy: str | int) -> None:
    machine, checked = Machine(0.2, 0.0), choose_depth(policy, 31)
    machine.play(checked, 60)
    assert sum(depth > 0 for depth in machine.depths) == CHECK_ROUNDS
    assert machine.depths[-20:] == [0] * 20 and checked.k == 0
    assert checked.alarm == checked.reason()
    for cause in ("another checkpoint", "convention", "positions"):
        assert cause in checked.reason()
    if policy == "auto":
        assert machine.depths.count(1) == CHECK_ROUNDS - SAMPLES, "one draft at a time once the trial is over"


def test_a_drafter_that_fits_is_not_given_up_even_on_a_hard_text() -> None:
    for seed in range(200):
        for policy in ("auto", 4):
            checked = choose_depth(policy, 31)
            Machine(1.0, 0.3, seed).play(checked, 80)
            assert checked.alarm is None


def test_the_check_does_not_disturb_a_policy() -> None:
    """Rounds that the check adds are not told to the policy: its trial and its costs are as without the check."""
    inner = Measured()
    checked = Checked(inner)
    Machine(1.0, 0.0).play(checked, CHECK_ROUNDS + 10)
    assert 1 not in inner.costs and inner.costs[0].seen >= SAMPLES
    alone, watched = Machine(0.1, 0.8, 5), Machine(0.1, 0.8, 5)
    alone.play(Measured(), 300)
    watched.play(Checked(Measured()), 300)
    assert alone.depths == watched.depths


def test_a_depth_of_zero_is_never_overruled() -> None:
    machine = Machine(0.1, 0.0)
    machine.play(choose_depth(0, 31), 50)
    assert machine.depths == [0] * 50


def test_a_high_temperature_is_not_taken_for_a_drafter_that_does_not_fit() -> None:
    """Drafts name the most probable token and the sampler draws another: what is accepted says little then."""
    checked = choose_depth(4, 31)
    for _ in range(100):
        checked.observe(checked.choose(), 0, True, 0.01)
    assert checked.alarm is None and checked.k == 4
