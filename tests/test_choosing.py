"""Whatever chooses the tokens, drafting changes nothing: penalties, filters, opaque samplers and processors, copies."""

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import pytest
from conftest import (
    FIXTURES,
    PROGRAMS,
    VOCAB,
    DialledDrafter,
    Forced,
    gap,
    mlx_lm_model,
    one_pass,
    open_sequence,
    plain,
    tiny,
    tiny_pair,
    tiny_qwen,
    varied_tokens,
)
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from test_rounds import EXACT

from mtp_mlx.cache import MAX_BLOCK
from mtp_mlx.choosing import Callables, Rules
from mtp_mlx.copying import Copies
from mtp_mlx.depth import Fixed, choose_depth
from mtp_mlx.ngram import NoDrafter
from mtp_mlx.penalties import Penalties
from mtp_mlx.rounds import rounds
from mtp_mlx.sampling import Greedy, Sample, Sampler
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Drafter, Pair, Target

FAMILIES = ["gemma4_keqv", "qwen3_5_tied"]
LENGTH = 36
PENALTIES = {
    "repetition": Penalties(repetition=1.4, repetition_context=7),
    "presence": Penalties(presence=1.5, presence_context=30),
    "frequency": Penalties(frequency=0.8),
    "bias": Penalties(bias=((176, -float("inf")), (5, 12.0), (7, 12.0))),
    "all": Penalties(repetition=1.2, presence=0.5, frequency=0.4, frequency_context=60, bias=((9, 2.0),)),
}
SAMPLERS: dict[str, Sampler] = {
    "greedy": Greedy(),
    "temperature": Sample(1.0),
    "top-p": Sample(0.9, top_p=0.8),
    "min-p": Sample(1.2, min_p=0.1),
    "top-k": Sample(0.8, top_k=20),
    "xtc": Sample(1.0, xtc_probability=0.5, xtc_threshold=0.05),
}


def write(
    target: Target,
    drafter: Drafter,
    chooser: Rules | Callables,
    prompt: list[int],
    k: int,
    seed: int,
    most: int = LENGTH,
) -> list[int]:
    sequence = Sequence(Pair(target, drafter, PROGRAMS), chooser, seed)
    sequence.prefill(prompt, 2048, lambda done, total: None)
    text: list[int] = []
    while len(text) < most:
        text += sequence.round(k if sequence.ready else 0).tokens
    return text[:most]


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize(
    ("penalties", "sampler"),
    [*((name, "temperature") for name in PENALTIES if name != "all"), *(("all", name) for name in SAMPLERS)],
)
def test_a_seeds_text_is_the_same_at_every_depth_with_every_rule(variant: str, penalties: str, sampler: str) -> None:
    target, own = tiny_pair(variant)
    prompt = varied_tokens(20)
    rules = Rules(SAMPLERS[sampler], PENALTIES[penalties])
    truth = write(target, NoDrafter(), rules, prompt, 0, 5, 24)
    assert write(target, DialledDrafter.every_partial(prompt + truth, 20, 3), rules, prompt, 3, 5, 24) == truth
    assert write(target, own, rules, prompt, 2, 5, 12) == truth[:12]
    if isinstance(rules.sampler, Greedy):
        others = write(target, NoDrafter(), Rules(rules.sampler), prompt, 0, 5, 12)
        assert others != truth[:12], "the penalties changed nothing"
    else:
        assert write(target, NoDrafter(), rules, prompt, 0, 6, 12) != truth[:12], "the seed changed nothing"


PROCESSORS: dict[str, Callable[[], dict[str, object]]] = {
    "none": dict,
    "penalties": lambda: {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "bias": lambda: {"logit_bias": {5: 3.0, 6: -100.0}, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("processors", PROCESSORS)
def test_mlx_lms_samplers_and_processors_write_mlx_lms_text(temperature: float, processors: str) -> None:
    """They draw from MLX's random state, once for every token of the text and in its order: as in mlx-lm itself."""
    target, own = tiny("gemma4_keqv")
    other = mlx_lm_model(FIXTURES / "gemma4_keqv")
    other.set_dtype(mx.float32)
    prompt = varied_tokens(12)
    sampler = make_sampler(temperature, top_p=0.9, top_k=50)
    chain = make_logits_processors(**PROCESSORS[processors]())  # type: ignore[arg-type]
    mx.random.seed(7)
    expected = [
        int(token)
        for token, _ in generate_step(mx.array(prompt), other, max_tokens=20, sampler=sampler, logits_processors=chain)
    ]
    for k, drafter in ((0, own), (3, own), (4, DialledDrafter.dial(prompt + expected, 0.7))):
        mx.random.seed(7)
        assert write(target, drafter, Callables(sampler, chain), prompt, k, 0, 20) == expected


@pytest.mark.parametrize("processors", ["penalties", "bias"])
def test_penalties_inside_the_round_write_mlx_lms_text(processors: str) -> None:
    target, own = tiny("gemma4_keqv")
    other = mlx_lm_model(FIXTURES / "gemma4_keqv")
    other.set_dtype(mx.float32)
    prompt = varied_tokens(12)
    chain = make_logits_processors(**PROCESSORS[processors]())  # type: ignore[arg-type]
    expected = [
        int(token) for token, _ in generate_step(mx.array(prompt), other, max_tokens=LENGTH, logits_processors=chain)
    ]
    penalties = {
        "penalties": Penalties(repetition=1.3, presence=0.7, frequency=0.4),
        "bias": Penalties(repetition=1.2, bias=((5, 3.0), (6, -100.0))),
    }
    for k in (0, 3):
        assert write(target, own, Rules(penalties=penalties[processors]), prompt, k, 0) == expected


@dataclass
class Diary:
    """A logits processor with a state of its own: it forbids a token once it has seen it three times."""

    seen: list[list[int]] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        text = [int(token) for token in tokens.tolist()]  # type: ignore[union-attr, arg-type]
        self.seen.append(text)
        self.counts[text[-1]] = self.counts.get(text[-1], 0) + 1
        banned = mx.array([self.counts.get(token, 0) >= 3 for token in range(VOCAB)])
        return mx.where(banned, -mx.inf, logits)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("sampler", [Greedy(), Sample(1.1)])
def test_a_processor_with_a_state_is_called_as_in_plain_decoding(variant: str, sampler: Greedy | Sample) -> None:
    target, own = tiny_pair(variant)
    prompt = varied_tokens(10)
    alone = Diary()
    truth = write(target, NoDrafter(), Callables(sampler, [alone]), prompt, 0, 3)
    for drafter in (own, DialledDrafter.dial(prompt + truth, 0.8)):
        diary = Diary()
        assert write(target, drafter, Callables(sampler, [diary]), prompt, 3, 3) == truth
        assert diary.seen[:LENGTH] == alone.seen[:LENGTH]
        assert diary.seen[0] == prompt and diary.seen[5] == prompt + truth[:5]


def test_nobody_is_asked_after_a_stop_inside_an_accepted_run() -> None:
    target, _ = tiny("gemma4_keqv")
    prompt = varied_tokens(10)
    truth = write(target, NoDrafter(), Callables(Greedy(), [Diary()]), prompt, 0, 0)
    place = next(i for i in range(4, LENGTH) if truth[i] not in truth[:i])
    diary = Diary()
    chooser = Callables(Greedy(), [diary], frozenset([truth[place]]))
    sequence = Sequence(Pair(target, DialledDrafter.dial(prompt + truth, 1.0), PROGRAMS), chooser)
    sequence.prefill(prompt, 2048, lambda done, total: None)
    text: list[int] = []
    while truth[place] not in text:
        text += sequence.round(5).tokens
    assert text == truth[: place + 1] and len(diary.seen) == place + 1


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("size", [1, 3, 7, 15, 31])
def test_copies_that_are_right_so_far_are_kept_so_far(variant: str, size: int) -> None:
    """Below and above the window, at every partial acceptance, the drafter's own rounds in between."""
    target, own = tiny_pair(variant)
    text = varied_tokens(420) + [0] * 40
    forced, expected = Forced(mx.array(text)), one_pass(target, text[:420])[5:]
    sequence = open_sequence(target, own, forced)
    sequence.prefill(text[:6], 4, lambda done, total: None)
    rows = [sequence.round(0)]
    for right in [*range(size + 1), size, 0, size // 2]:
        if sequence.length + size + 4 > 400:
            break
        here = sequence.length + 1
        copy = text[here : here + right] + [(token + 1) % VOCAB for token in text[here + right : here + size]]
        rows.append(sequence.round(copy))
        assert rows[-1].accepted == right and rows[-1].copied
        rows.append(sequence.round(2))
    tokens = [token for result in rows for token in result.tokens]
    assert tokens == text[6 : 6 + len(tokens)]
    kept = mx.concatenate([result.logprobs[: len(result.tokens)] for result in rows])
    assert gap(kept, expected[: len(tokens)]) < EXACT


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("own", [True, False])
def test_text_that_repeats_itself_takes_fewer_rounds_and_stays_the_same(variant: str, own: bool) -> None:
    target, drafter = tiny_pair(variant)
    passage = varied_tokens(60, seed=9)
    text = passage + varied_tokens(5, seed=2) + passage + [0] * 40
    forced = Forced(mx.array(text))
    for depth in (Fixed(2), choose_depth("auto", 8 if own else 0, reproducible=True)):
        sequence = open_sequence(target, drafter if own else NoDrafter(), forced)
        sequence.prefill(text[:75], 32, lambda done, total: None)
        if isinstance(depth, Fixed) and not own:
            continue
        found = list(rounds(sequence, depth, 50, Copies(text[:75])))
        assert [token for result in found for token in result.tokens] == text[75:125]
        assert sum(result.accepted for result in found if result.copied) > 30
        assert len(found) < 20


def test_a_prediction_is_copied_from_its_first_token() -> None:
    target, drafter = tiny("gemma4_keqv")
    prompt = varied_tokens(10)
    truth = plain(target, prompt, 60)
    predicted = [*truth[:20], 3, 3, *truth[20:]]  # two tokens that will not come
    sequence = open_sequence(target, drafter, Greedy())
    sequence.prefill(prompt, 32, lambda done, total: None)
    found = list(rounds(sequence, Fixed(1), 60, Copies(prompt, predicted)))
    assert [token for result in found for token in result.tokens] == truth
    assert len(found) < 15


def test_no_copy_is_longer_than_a_block_may_be() -> None:
    target, drafter = tiny("gemma4_keqv")
    prompt = varied_tokens(10)
    truth = plain(target, prompt, 60)
    sequence = open_sequence(target, drafter, Greedy())
    sequence.prefill(prompt, 32, lambda done, total: None)
    for result in rounds(sequence, choose_depth("auto", 31, reproducible=True), 60, Copies(prompt, truth)):
        assert result.drafted < MAX_BLOCK


def test_an_ordered_heads_candidates_are_sampled_by_their_token() -> None:
    """Its scores are over candidates; noise, penalties and laws are over the vocabulary."""
    target, ordered = tiny("gemma4_keqv", "assistant_ordered")
    prompt = varied_tokens(20)
    for rules in (Rules(Sample(0.8), PENALTIES["all"]), Rules(Sample(0.8), drafts=Sample(0.6, top_p=0.9))):
        truth = write(target, NoDrafter(), rules, prompt, 0, 1)
        text = write(target, ordered, rules, prompt, 3, 1)
        assert text == truth or rules.drafts != "coupled"
        assert all(0 <= token < VOCAB for token in text)


def test_qwen_drafts_are_sampled_too() -> None:
    target, head = tiny_qwen("qwen3_5_tied")
    text = write(target, head, Rules(Sample(1.0), drafts=Sample(0.7)), varied_tokens(20), 4, 1)
    assert len(text) == LENGTH
