"""What is proposed did follow the same words before, or is what the caller predicted; and looking it up is quick."""

import random
import time
from collections.abc import Sequence

import pytest

from mtp_mlx.copying import LONGEST, MIN_MATCH, MIN_PREDICTED, MISSES, PAUSE, Copies


def words(n: int, seed: int = 0) -> list[int]:
    """Token ids of which no run repeats itself by chance."""
    draw = random.Random(seed)
    return [draw.randrange(100_000) for _ in range(n)]


def repeats(text: Sequence[int], ahead: Sequence[int]) -> bool:
    """Whether `ahead`, after some earlier occurrence of the last MIN_MATCH tokens, is really in the text."""
    tail = list(text[-MIN_MATCH:])
    whole = [*text, *ahead]
    found = (i for i in range(MIN_MATCH, len(text)) if whole[i - MIN_MATCH : i] == tail)
    return any(whole[i : i + len(ahead)] == list(ahead) for i in found)


def replayed(copies: Copies, output: Sequence[int], most: int = 15) -> tuple[int, int]:
    """Rounds that writing `output` takes, and tokens that were proposed in vain."""
    written, rounds, wasted = 0, 0, 0
    while written < len(output):
        ahead = copies.propose(min(most, len(output) - written - 1))
        accepted = 0
        while accepted < len(ahead) and ahead[accepted] == output[written + accepted]:
            accepted += 1
        copies.observe(len(ahead), accepted)
        copies.extend(output[written : written + accepted + 1])
        written, rounds, wasted = written + accepted + 1, rounds + 1, wasted + len(ahead) - accepted
    return rounds, wasted


# The prompt and the output so far


def test_a_passage_of_the_prompt_is_gone_on_with() -> None:
    prompt = words(200)
    copies = Copies(prompt)
    copies.extend(prompt[50:70])
    assert copies.propose(10) == prompt[70:80]
    assert copies.propose(0) == [] and copies.propose(1) == prompt[70:71]


def test_what_is_proposed_is_the_text_after_an_earlier_occurrence() -> None:
    """On a text of few words, so that there are many occurrences of everything."""
    draw = random.Random(1)
    proposed = 0
    for _ in range(40):
        text = [draw.randrange(2) for _ in range(60)]
        copies = Copies(text)
        for _ in range(20):
            ahead = copies.propose(draw.randint(1, 12))
            proposed += len(ahead)
            assert not ahead or repeats(text, ahead)
            tokens = [draw.randrange(2) for _ in range(draw.randint(1, 4))]
            copies.extend(tokens)
            text += tokens
    assert proposed > 1000


def test_a_short_agreement_is_not_copied_from() -> None:
    prompt = words(100)
    for agreeing in range(1, MIN_MATCH + 3):
        copies = Copies(prompt)
        copies.extend([7, *prompt[40 : 40 + agreeing]])
        assert bool(copies.propose(5)) == (agreeing >= MIN_MATCH)


def test_the_longest_agreement_decides_and_the_latest_on_a_tie() -> None:
    common, far = words(MIN_MATCH, 1), words(4, 2)
    text = [*far, *common, 1, 1, 1, 9, *common, 2, 2, 2, 8, *common, 3, 3, 3]
    copies = Copies(text)
    copies.extend([5, *common])
    assert copies.propose(3) == [3, 3, 3], "all agree alike: the latest"
    copies.extend([6, *far, *common])
    assert copies.propose(3) == [1, 1, 1], "the first agrees further back"


def test_a_copy_is_no_longer_than_the_agreement() -> None:
    prompt = words(300)
    for agreeing in (MIN_MATCH, 20, 100):
        copies = Copies(prompt)
        copies.extend([7, *prompt[40 : 40 + agreeing]])
        assert len(copies.propose(200)) == min(agreeing, LONGEST)


def test_nothing_is_proposed_beyond_the_end() -> None:
    """The prompt's end is repeated; what follows it is the output itself, as far as it goes."""
    prompt = words(100)
    copies = Copies(prompt)
    copies.extend(prompt[-20:])
    assert copies.propose(40) == prompt[-20:], "one period, as long as the agreement"
    gap = Copies([*prompt, *words(12, 3)])
    gap.extend(prompt[-MIN_MATCH:])
    assert len(gap.propose(40)) == MIN_MATCH


def test_runs_that_share_a_hash_are_told_apart() -> None:
    run, other = words(MIN_MATCH), words(20, 1)
    assert hash((-1, *run[1:])) == hash((-2, *run[1:]))
    copies = Copies([-1, *run[1:], *other], [-1, *run[1:], *other])
    copies.extend([5, -2, *run[1:MIN_PREDICTED]])
    assert copies.propose(5) == []
    copies.extend(run[MIN_PREDICTED:])
    copies.following = False
    assert copies.propose(5) == []


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_a_loop_is_gone_on_with(period: int) -> None:
    loop = words(period, 4)
    copies = Copies([1, 2, 3])
    copies.extend(loop * 30)
    assert copies.propose(20) == (loop * 20)[:20]
    copies.extend(loop[:1])
    assert copies.propose(20) == (loop * 21)[1:21]


def test_a_text_that_never_repeats_itself_proposes_nothing() -> None:
    copies, text = Copies(words(500)), words(500, 5)
    for token in text:
        copies.extend([token])
        assert copies.propose(7) == []
    assert Copies([]).propose(5) == []


# A predicted text


def test_a_predicted_text_is_proposed_from_its_beginning() -> None:
    predicted = words(50)
    copies = Copies([1, 2, 3], predicted)
    assert copies.propose(8) == predicted[:8]
    copies.extend(predicted[:8])
    assert copies.propose(100) == predicted[8:], "and not beyond its end"
    copies.extend(predicted[8:])
    assert copies.propose(5) == []


@pytest.mark.parametrize("put_in", [[], [1], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("left_out", [0, 1, 6, 100])
def test_the_place_is_found_again_after_an_edit(put_in: list[int], left_out: int) -> None:
    predicted = words(300)
    back = predicted[100 + left_out :]
    copies = Copies([1, 2, 3], predicted)
    copies.extend(predicted[:100])
    copies.extend(put_in)
    copies.extend(back[:MIN_PREDICTED])
    assert copies.propose(10) == back[MIN_PREDICTED : MIN_PREDICTED + 10]


def test_an_edited_file_is_written_in_few_rounds() -> None:
    """A name of one token becomes one of two in every fiftieth place, and a passage is left out."""
    predicted = words(1000)
    for i in range(25, 1000, 50):
        predicted[i] = 7
    output = [new for token in predicted[:400] + predicted[480:] for new in ([8, 9] if token == 7 else [token])]
    rounds, wasted = replayed(Copies([], predicted), output)
    assert len(output) / rounds > 6
    assert wasted < len(output) / 2


def test_of_many_places_that_agree_the_next_one_ahead_is_taken() -> None:
    line = [1, 2, 3]
    predicted = [token for number in range(100, 140) for token in (*line, number)]
    copies = Copies([], predicted)
    copies.extend(predicted[:40])
    copies.extend([999, *line])
    assert copies.propose(2) == predicted[43:45]


def test_an_output_that_begins_otherwise_comes_to_the_predicted_text() -> None:
    predicted = words(50)
    copies = Copies([], predicted)
    copies.extend([1, 2])
    assert copies.propose(5) == []
    copies.extend(predicted[: MIN_PREDICTED - 1])
    assert copies.propose(5) == []
    copies.extend(predicted[MIN_PREDICTED - 1 : MIN_PREDICTED])
    assert copies.propose(5) == predicted[MIN_PREDICTED : MIN_PREDICTED + 5]


def test_the_predicted_text_goes_before_the_prompt_and_the_prompt_helps_out() -> None:
    shared, prompt_goes_on, predicted_goes_on = words(20, 1), words(10, 2), words(10, 3)
    prompt = [*shared, *prompt_goes_on]
    copies = Copies(prompt, [*shared, *predicted_goes_on])
    copies.extend(shared)
    assert copies.propose(5) == predicted_goes_on[:5]
    copies.extend(prompt_goes_on[:3])
    assert copies.propose(5) == prompt_goes_on[3:8]


# Rounds


def test_misses_make_a_pause() -> None:
    prompt = words(100)
    copies = Copies(prompt)
    copies.extend(prompt[:20])
    for _ in range(MISSES):
        assert copies.propose(5)
        copies.observe(5, 0)
    for i in range(PAUSE):
        assert copies.propose(5) == []
        copies.extend(prompt[20 + i : 21 + i])
    assert copies.propose(5) == prompt[20 + PAUSE : 25 + PAUSE]


def test_a_copy_that_is_right_in_part_makes_no_pause() -> None:
    prompt = words(100)
    copies = Copies(prompt)
    copies.extend(prompt[:20])
    for accepted in (0, 0, 0, 1, 0, 0, 0):
        copies.observe(5, accepted)
        copies.observe(0, 0)
    assert copies.propose(5)


def test_asking_changes_nothing_and_rounds_may_be_of_any_length() -> None:
    prompt = words(200)
    whole, pieces = Copies(prompt, prompt[50:90]), Copies(prompt, prompt[50:90])
    whole.extend(prompt[50:120])
    for i in range(50, 120):
        pieces.propose(9)
        pieces.extend(prompt[i : i + 1])
    assert whole.propose(20) == pieces.propose(20) == prompt[120:140]


def test_long_prompts_are_read_quickly_and_looked_up_at_once() -> None:
    """Bounds of several times what it takes, so that they hold on a busy machine."""
    prompt, loop = words(20_000), [1, 2, 3, 4] * 5_000
    for text in (prompt, loop):
        began = time.process_time()
        copies = Copies(text, text)
        assert time.process_time() - began < 0.3
        began = time.process_time()
        for _ in range(100):
            copies.propose(31)
            copies.extend(text[:2])
        assert time.process_time() - began < 0.3
