"""The user's own proof: on this machine, is what MTP writes what plain decoding writes?

The judge drafts nothing and rolls nothing back. Texts come from `stream_generate`, with and without drafts; the
target then reads them again, and what it says there is the measure. Why these checks: docs/exactness.md.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count, pairwise
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.accept import normalise
from mtp_mlx.choosing import Drafts
from mtp_mlx.errors import RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.options import DEFAULT_PREFILL_STEP
from mtp_mlx.sampling import Greedy, Sample, Sampler, keys
from mtp_mlx.stats import Stats
from mtp_mlx.types import Pair, Span

Verdict = Literal["equal", "near-tie", "fault"]
Prompts = Mapping[str, list[int]]  # token ids by name
Watch = Callable[[str], None]  # told what is being done

SUSPICIOUS, MORE = 1e-2, 4  # a p-value below which more tokens are drawn, and how many times as many
UNLIKELY = 1e-4  # a chance below which chance is no explanation
STRAYS = 0.002  # share of drawn tokens that may differ from what their key draws: noise may be rounded otherwise
LOOSER = 4.0  # how many times as much as reading it as a prompt a block of rows may change a text's numbers
HARMLESS = 1e-4  # nats that nobody minds, should rounding be seen nowhere
COARSEST = 2.0**-10  # float32 products may be rounded to this (TF32)
TOP = 10  # tokens of a row whose log-probabilities are compared
RANKS = (1, 2, 4, 8, 16, 32, 64)  # where classes of ranks end; the last class has no end
ENOUGH = 8.0  # tokens expected in a class for its count to be normally distributed


@dataclass(frozen=True)
class Plan:
    """What is to be verified."""

    depths: tuple[int | str, ...] = (1, 3, "auto")
    tokens: int = 48  # of each text
    sampler: Sampler | None = None  # None leaves out what is drawn at a temperature
    drawn: int = 960  # tokens drawn at a temperature, at least
    seed: int = 0

    def check(self, limit: int) -> None:
        """Raises RequestError for what would prove nothing with a drafter of that limit."""
        if limit == 0:
            raise RequestError("there is no drafter, so there is nothing to verify; name one with --drafter")
        if 0 in self.depths or not self.depths:
            raise RequestError("depth 0 is plain decoding, which the others are compared with; give another --depth")
        if max(self.fixed, default=0) > limit:
            raise RequestError(f"depth {self.fixed[0]} is more than this drafter's limit of {limit}")
        if self.tokens < 2:
            raise RequestError(f"{self.tokens} tokens leave nothing to draft; give at least 2, better 48")

    @property
    def fixed(self) -> list[int]:
        """The depths that are numbers, deepest first."""
        return sorted((depth for depth in self.depths if isinstance(depth, int)), reverse=True)


@dataclass(frozen=True)
class Run:
    """One text as it was generated."""

    name: str  # of its prompt
    prompt: list[int]
    depth: int | str
    sampler: Sampler
    seed: int
    tokens: list[int]
    rows: mx.array  # (n, V) the log-probabilities each token was chosen from
    stats: Stats

    def law(self, rows: mx.array) -> mx.array:
        """What the sampler draws from in the first rows of the text, (n, V) log-probabilities."""
        return self.sampler.law(rows[None], self._keys(rows.shape[0]))[0]

    def strays(self) -> int:
        """How many tokens are not what the sampler chooses from their rows."""
        chosen = self.sampler(self.rows[None], self._keys(len(self.tokens)))[0]
        return int(_number((chosen != mx.array(self.tokens)).sum()))

    def _keys(self, length: int) -> mx.array:
        return keys(mx.array(self.seed, mx.uint32), (len(self.prompt) + mx.arange(length))[None])


@dataclass(frozen=True)
class Noise:
    """How far log-probabilities move when a text is not read token by token but so many rows at a time."""

    rows: int | None  # None: all at once, as a prompt
    largest: float  # nats, among the most probable tokens of every row
    mean: float  # over rows, of the largest of each


@dataclass(frozen=True)
class Numerics:
    """What rounding does on this machine, measured where nothing is drafted and nothing rolled back."""

    dtype: str
    spacing: float  # between two logits of 16 or more: the least that one rounding can do there
    blocks: tuple[Noise, ...]
    prompt: Noise

    @property
    def nearness(self) -> float:
        """How far apart two tokens may lie for rounding to swap them: each moves by the largest change at most."""
        return max(2 * self._largest, HARMLESS)

    @property
    def bound(self) -> float:
        """How far rows may move on average by being verified in blocks."""
        return max(LOOSER * self.prompt.mean, self.spacing, HARMLESS)

    @property
    def reach(self) -> float:
        """How far a single row may move."""
        return max(LOOSER * self._largest, self.spacing, HARMLESS)

    @property
    def _largest(self) -> float:
        return max(noise.largest for noise in (*self.blocks, self.prompt))

    def faults(self) -> list[str]:
        """What is too large to be rounding."""
        if not self.prompt.mean <= LOOSER * max(self.spacing, 16 * COARSEST):
            return [f"texts read as prompts differ by {self.prompt.mean:.2g} nats from themselves read token by token"]
        return [
            f"texts read {noise.rows} rows at a time differ by {noise.mean:.2g} nats from themselves read token by "
            f"token, {self.bound:.2g} may be"
            for noise in self.blocks
            if not noise.mean <= self.bound
        ]

    def shifted(self, shift: float, jump: float) -> str | None:
        """What is wrong with rows that differ so much on average and at most, if anything."""
        if not shift <= self.bound:
            return f"the target's log-probabilities are off by {shift:.2g} nats on average, {self.bound:.2g} may be"
        if not jump <= self.reach:
            return f"the target's log-probabilities are off by {jump:.2g} nats at one token, {self.reach:.2g} may be"
        return None


@dataclass(frozen=True)
class Difference:
    """Where a text first leaves plain decoding's."""

    place: int  # 0 is the first generated token
    plain: int | None  # its token; None where the text has ended
    other: int | None
    gap: float | None  # nats between the two in plain decoding's row; None where one text has ended
    chance: float  # that rounding alone makes two texts with the same seed differ by there


@dataclass(frozen=True)
class Comparison:
    """A text generated with drafts, judged by what the target says of it without."""

    prompt: str
    depth: int | str
    drawn: bool  # at a temperature
    tokens: int
    tokens_per_round: float
    drafted: int
    accepted: int
    first: Difference | None
    gap: float  # nats by which the worst token of the text falls short of its row's best
    shift: float  # nats by which the rows it was chosen from differ from the target's, on average
    jump: float  # nats by which one of them does at most
    strays: int  # tokens that the sampler does not choose from the row they are said to come from

    @property
    def where(self) -> str:
        return f"{self.prompt}, depth {self.depth}{', drawn' if self.drawn else ''}"

    def verdict(self, numerics: Numerics) -> Verdict:
        if self.fault(numerics):
            return "fault"
        return "near-tie" if self.first else "equal"

    def fault(self, numerics: Numerics) -> str | None:
        """What rounding does not explain, if anything."""
        if self.strays > (STRAYS * self.tokens + 1 if self.drawn else 0):
            return f"{self.strays} of {self.tokens} tokens are not what the sampler chooses"
        if self.first and self.first.gap is None:
            return "one text goes on where the other ends"
        if self.first and self.drawn and self.first.chance < UNLIKELY:
            return f"another text for the same seed; rounding does that in {self.first.chance:.1g} of all cases"
        if not self.drawn and not self.gap <= numerics.nearness:
            return f"a token {self.gap:.2g} nats less probable than the best; rounding explains {numerics.nearness:.2g}"
        return numerics.shifted(self.shift, self.jump)


@dataclass(frozen=True)
class Fit:
    """Whether tokens drawn with MTP have the target's distribution."""

    tokens: int
    texts: int
    p_value: float
    classes: int  # how many classes of ranks the tokens were numerous enough for
    strays: int
    shift: float
    jump: float
    tokens_per_round: float
    accepted: int
    pairs: tuple[Comparison, ...]  # the first texts beside plain decoding with the same seed

    @property
    def astray(self) -> bool:
        """Whether more tokens differ from what the sampler draws with their keys than rounding explains."""
        return self.strays > STRAYS * self.tokens

    def fault(self, numerics: Numerics) -> str | None:
        """What neither chance nor rounding explains, if anything."""
        if self.astray:
            return f"{self.strays} of {self.tokens} tokens are not what the sampler draws with their keys"
        if self.p_value < UNLIKELY:
            return f"{self.tokens} tokens do not have the target's distribution (p = {self.p_value:.1g})"
        return numerics.shifted(self.shift, self.jump)


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    numerics: Numerics
    greedy: tuple[Comparison, ...]
    fits: tuple[Fit, ...]  # none without a sampler; a second one where the first looked suspicious

    @property
    def comparisons(self) -> list[Comparison]:
        """Every text that stands beside plain decoding's."""
        return [*self.greedy, *(pair for fit in self.fits for pair in fit.pairs)]

    @property
    def verdict(self) -> Verdict:
        if self.faults():
            return "fault"
        return "near-tie" if any(comparison.first for comparison in self.comparisons) else "equal"

    def faults(self) -> list[str]:
        """One line each. A suspicion that more tokens have cleared is none."""
        found = [(f"{c.where}: ", c.fault(self.numerics)) for c in self.comparisons]
        found += [("", fit.fault(self.numerics)) for fit in self.fits[-1:]]
        return [*self.numerics.faults(), *(where + fault for where, fault in found if fault)]

    def weakness(self) -> str | None:
        """Why the verdict says less than it seems to, if it does."""
        if not sum(c.accepted for c in self.greedy) + sum(fit.accepted for fit in self.fits):
            return "nothing was accepted, so this proves little: the drafter may not fit this target"
        if any(fit.classes == 0 for fit in self.fits):
            return "the drawn tokens were too few or too certain for a test of their distribution"
        return None

    def sentence(self) -> str:
        """The verdict in words."""
        faults, texts = self.faults(), len(self.comparisons)
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            return f"FAULT: {faults[0]}{more}. Please report it with this output; --depth 0 decodes without drafts."
        fit = "".join(f"; {f.tokens} drawn tokens fit the target's distribution" for f in self.fits[-1:])
        near = sum(comparison.first is not None for comparison in self.comparisons)
        if near:
            what = f"{near} near-tie{'s' * (near > 1)} (tokens as close as rounding here moves them)"
            return f"Equal but for {what}: {texts - near} of {texts} texts are the same with and without drafts{fit}."
        return f"Output is unchanged: {texts} of {texts} texts are the same with and without drafts{fit}."

    def figures(self) -> dict[str, Any]:
        """Everything as plain data, under the names of `mtp-mlx verify --json`."""
        judged = [
            {**asdict(c), "verdict": c.verdict(self.numerics), "fault": c.fault(self.numerics)}
            for c in self.comparisons
        ]
        fits = [{name: value for name, value in asdict(fit).items() if name != "pairs"} for fit in self.fits]
        return {
            "verdict": self.verdict,
            "sentence": self.sentence(),
            "weakness": self.weakness(),
            "faults": self.faults(),
            "numerics": {
                **asdict(self.numerics),
                "nearness": self.numerics.nearness,
                "bound": self.numerics.bound,
                "reach": self.numerics.reach,
            },
            "comparisons": judged,
            "fits": fits,
        }


def verify(pair: Pair, tokenizer: TokenizerWrapper, prompts: Prompts, plan: Plan, watch: Watch) -> Report:
    """Compare every depth with plain decoding, and what is drawn with the target's distribution.

    Raises RequestError without a drafter or with a plan that proves nothing.
    """
    plan.check(pair.drafter.limit)
    assert prompts, "nothing to generate from"
    writer = _Writer(pair, tokenizer, prompts, plan.tokens)
    greedy: list[Comparison] = []
    changes: dict[int | None, list[mx.array]] = {}
    for name in prompts:
        watch(f"{name}: plain decoding")
        plain = writer.write(name, 0, Greedy(), plan.seed)
        for rows in (*(depth + 1 for depth in plan.fixed), None):
            changes.setdefault(rows, []).append(changed(plain.rows, reread(pair, plain, rows)))
        for depth in plan.depths:
            watch(f"{name}: depth {depth}")
            greedy.append(compare(pair, plain, writer.write(name, depth, Greedy(), plan.seed)))
    report = Report(numerics(plain.rows.dtype, changes), tuple(greedy), ())
    if plan.sampler is None:
        return report
    first = _draw(writer, plan, plan.sampler, 0, plan.drawn, watch, pairs=len(prompts))
    if first.p_value >= SUSPICIOUS or first.astray or report.faults():
        return replace(report, fits=(first,))
    # Other seeds, so that the second judgement owes nothing to the first.
    second = _draw(writer, plan, plan.sampler, first.texts, MORE * plan.drawn, watch, pairs=0)
    return replace(report, fits=(first, second))


@dataclass(frozen=True)
class _Writer:
    """Generates texts as any program would."""

    pair: Pair
    tokenizer: TokenizerWrapper
    prompts: Prompts
    tokens: int

    def write(self, name: str, depth: int | str, sampler: Sampler, seed: int, drafts: Drafts = "coupled") -> Run:
        prompt = self.prompts[name]
        options: dict[str, Any] = {"depth": depth, "sampler": sampler, "seed": seed, "drafts": drafts}
        responses = list(stream_generate(self.pair, self.tokenizer, prompt, self.tokens, **options))
        rows = mx.stack([response.logprobs for response in responses])
        tokens = [response.token for response in responses]
        return Run(name, prompt, depth, sampler, seed, tokens, rows, responses[-1].stats)


def _draw(writer: _Writer, plan: Plan, sampler: Sampler, skip: int, wanted: int, watch: Watch, *, pairs: int) -> Fit:
    """Draw at least `wanted` tokens with drafts; text i has seed + i. The first `skip` texts have been drawn before.

    The first `pairs` texts are also compared with plain decoding's.
    """
    pair, names = writer.pair, list(writer.prompts)
    depths = plan.depths[::-1]
    ranks, favourites = Draws.none(len(RANKS) + 1), Draws.none(2)
    strays, accepted, rounds = 0, 0, 0
    compared, changes = [], []
    for text in count():
        watch(f"drawing {wanted} tokens: {ranks.tokens}")
        name, depth = names[text % len(names)], depths[text // len(names) % len(depths)]
        seed = (plan.seed + skip + text) % 2**32
        # Every other text that is not compared is drafted as without a seed: drawn by chance and tested by rejection.
        drafts = sampler if isinstance(sampler, Sample) and text >= pairs and text % 2 == 1 else None
        run = writer.write(name, depth, sampler, seed, drafts or "coupled")
        truth = reread(pair, run, None)
        law = run.law(truth)
        ranks += Draws.ranked(law, run.tokens)
        changes.append(changed(truth, run.rows))
        if drafts:
            favourites += Draws.favoured(law[1:], run.law(proposals(writer.pair, run))[1:], run.tokens[1:])
        else:
            strays += run.strays()
        accepted, rounds = accepted + run.stats.accepted, rounds + run.stats.rounds
        if text < pairs:
            compared.append(compare(pair, writer.write(name, 0, sampler, seed), run))
        if ranks.tokens >= wanted:
            break
    every = mx.concatenate(changes)
    return Fit(
        tokens=ranks.tokens,
        texts=text + 1,
        p_value=min(1.0, 2 * ranks.p_value, 2 * favourites.p_value),
        classes=ranks.classes,
        strays=strays,
        shift=_number(every.mean()),
        jump=_number(every.max()),
        tokens_per_round=ranks.tokens / rounds,
        accepted=accepted,
        pairs=tuple(compared),
    )


def reread(pair: Pair, run: Run, rows: int | None) -> mx.array:
    """The log-probabilities (n, V) that the target gives for every token of a text, read so many rows at a time.

    None reads all at once, as prompts are read. Every row that is written stays.
    """
    ids = mx.array([*run.prompt, *run.tokens[:-1]], mx.int32)[None]
    known, end = len(run.prompt) - 1, ids.shape[1]
    cache = pair.make_cache()
    cache.reserve(end + 1 + (rows or 0))
    read = []
    for start, stop in pairwise([*range(0, known, DEFAULT_PREFILL_STEP), *range(known, end, rows or end), end]):
        as_prompt = rows is None or start < known
        span = Span(start, stop - start) if as_prompt else cache.span(stop - start)
        logits = pair.target(ids[:, start:stop], cache, span).logits
        cache.commit(span.length)
        if start >= known:
            read.append(normalise(logits[0]))
        mx.eval(read[-1:], cache.arrays())
    return mx.concatenate(read)


def proposals(pair: Pair, run: Run) -> mx.array:
    """The log-probabilities (n, V) that the drafter gives for every token of a text but the first, whose row is 0."""
    text = mx.array([*run.prompt, *run.tokens], mx.int32)[None]
    known, end, vocabulary = len(run.prompt) - 1, text.shape[1] - 1, pair.target.vocabulary
    cache = pair.make_cache()
    state = pair.drafter.start(cache)
    cache.reserve(end)
    heard = [mx.zeros((1, vocabulary), run.rows.dtype)]

    def hear(logits: mx.array, ids: mx.array | None = None) -> mx.array:
        if ids is not None:
            nowhere = mx.full((1, 1, vocabulary), -mx.inf, logits.dtype)
            logits = mx.put_along_axis(nowhere, ids.astype(mx.int32), logits, axis=-1)
        heard.append(normalise(logits[0]))
        return mx.argmax(logits, axis=-1)

    for start, stop in pairwise([*range(0, known, DEFAULT_PREFILL_STEP), *range(known, end)]):
        block, reading = text[:, start:stop], start < known
        span = Span(start, stop - start) if reading else cache.span(1)
        hidden = pair.target(block, cache, span).hidden
        if pair.drafter.reads_prompt or not reading:
            state = pair.drafter.advance(state, cache, block, span, hidden, mx.array([span.length - 1]))
        cache.commit(span.length)
        if not reading:
            pair.drafter.draft(state, cache, text[:, stop], 1, hear)  # what follows the token at `stop`
        mx.eval(heard[-1], cache.arrays(), state)
    return mx.concatenate(heard)


def changed(rows: mx.array, others: mx.array) -> mx.array:
    """The largest change of a log-probability among each row's most probable tokens, (n, V) twice -> (n,) nats."""
    most = min(TOP, rows.shape[1] - 1)
    top = mx.argpartition(-rows, most, axis=-1)[:, :most]
    before, after = (mx.take_along_axis(array, top, axis=-1).astype(mx.float32) for array in (rows, others))
    return mx.abs(before - after).max(axis=-1)


def numerics(dtype: mx.Dtype, changes: Mapping[int | None, list[mx.array]]) -> Numerics:
    """What was seen of rounding: changes of rows by the number of rows read at a time, the prompt's last."""
    every = {rows: mx.concatenate(found) for rows, found in changes.items()}
    noises = [Noise(rows, _number(found.max()), _number(found.mean())) for rows, found in every.items()]
    spacing = 16 * float(mx.finfo(dtype).eps)
    return Numerics(str(dtype).removeprefix("mlx.core."), spacing, tuple(noises[:-1]), noises[-1])


def compare(pair: Pair, plain: Run, run: Run) -> Comparison:
    """Judge a text by plain decoding's own rows and, from where the two part, by reading it again."""
    place = first_difference(plain.tokens, run.tokens)
    truth = plain.rows
    if place is not None:
        known = plain.rows[: place + 1][: len(run.tokens)]
        truth = mx.concatenate([known, reread(pair, run, None)[known.shape[0] :]])
    chosen = mx.take_along_axis(truth, mx.array(run.tokens)[:, None], axis=-1)[:, 0]
    change = changed(truth, run.rows)
    return Comparison(
        prompt=run.name,
        depth=run.depth,
        drawn=not isinstance(run.sampler, Greedy),
        tokens=len(run.tokens),
        tokens_per_round=run.stats.tokens_per_round,
        drafted=run.stats.drafted,
        accepted=run.stats.accepted,
        first=None if place is None else _difference(place, plain, run),
        gap=_number((truth.max(axis=-1) - chosen).max()),
        shift=_number(change.mean()),
        jump=_number(change.max()),
        strays=run.strays(),
    )


def first_difference(tokens: list[int], others: list[int]) -> int | None:
    """The first place where two texts differ; one may simply be longer."""
    if tokens == others:
        return None
    shorter = min(len(tokens), len(others))
    return next((i for i in range(shorter) if tokens[i] != others[i]), shorter)


def _difference(place: int, plain: Run, run: Run) -> Difference:
    mine, other = (text.tokens[place] if place < len(text.tokens) else None for text in (plain, run))
    if mine is None or other is None:
        return Difference(place, mine, other, None, 0.0)
    row = plain.rows[place].astype(mx.float32)
    laws = (text.law(text.rows[: place + 1]) for text in (plain, run))
    return Difference(place, mine, other, _number(row[mine] - row[other]), chance_of_difference(*laws))


def chance_of_difference(law: mx.array, other: mx.array) -> float:
    """At most so likely do two texts differ whose tokens are drawn from such rows (n, V) with the same Gumbel noise.

    At one row it is at most 2 TV / (1 + TV) (Daliri, Musco, Suresh 2024, arXiv 2408.07978).
    """
    distance = 0.5 * mx.abs(mx.exp(law) - mx.exp(other)).sum(axis=-1)
    return min(1.0, _number((2 * distance / (1 + distance)).sum()))


def _number(array: mx.array) -> float:
    return cast(float, array.item())


@dataclass(frozen=True)
class Draws:
    """How often tokens of each class were drawn, beside how often the target's own distribution lets one expect it.

    Given the text before a token, it falls into each class with known probability. So the counts differ from their
    expectation by something of mean 0 and of a covariance that adds up row by row, whatever the text is.
    """

    tokens: int
    observed: np.ndarray  # (C,)
    expected: np.ndarray  # (C,)
    covariance: np.ndarray  # (C, C)

    @classmethod
    def none(cls, classes: int) -> "Draws":
        return cls(0, np.zeros(classes), np.zeros(classes), np.zeros((classes, classes)))

    @classmethod
    def counted(cls, chances: np.ndarray, seen: np.ndarray) -> "Draws":
        """Of each class's probability (n, C) and the class of each token (n)."""
        observed = np.bincount(seen, minlength=chances.shape[1])
        covariance = np.diag(chances.sum(axis=0)) - chances.T @ chances
        return cls(len(seen), observed.astype(np.float64), chances.sum(axis=0), covariance)

    @classmethod
    def ranked(cls, law: mx.array, tokens: list[int]) -> "Draws":
        """Tokens (n) drawn from the log-probabilities `law` (n, V), by rank: 1, 2, 3-4, 5-8, ... 65 and above."""
        order = mx.argsort(-law, axis=-1)
        rank = np.array(mx.argmax(order == mx.array(tokens)[:, None], axis=-1))  # (n,)
        best = np.array(mx.exp(mx.take_along_axis(law, order, axis=-1)[:, : RANKS[-1]]), np.float64)
        below = np.cumsum(best, axis=1)[:, [min(end, best.shape[1]) - 1 for end in RANKS]]  # probability up to a rank
        chances = np.diff(below, axis=1, prepend=0.0, append=1.0)  # (n, C)
        return cls.counted(chances, np.searchsorted(RANKS, rank, side="right"))

    @classmethod
    def favoured(cls, law: mx.array, proposal: mx.array, tokens: list[int]) -> "Draws":
        """The same tokens by whether the drafter, proposing from (n, V), gives them more than the target does.

        Drafts that are kept too often are such tokens, whatever their rank.
        """
        more = proposal > law
        chance = np.array(mx.where(more, mx.exp(law), 0.0).sum(axis=-1), np.float64)
        seen = np.array(mx.take_along_axis(more, mx.array(tokens)[:, None], axis=-1)[:, 0])
        return cls.counted(np.stack([1 - chance, chance], axis=1), seen.astype(np.int64))

    def __add__(self, other: "Draws") -> "Draws":
        return Draws(
            self.tokens + other.tokens,
            self.observed + other.observed,
            self.expected + other.expected,
            self.covariance + other.covariance,
        )

    @property
    def classes(self) -> int:
        """How many classes can be tested."""
        return len(self._tested())

    @property
    def p_value(self) -> float:
        """How likely counts at least as far from the expected ones are, if they have the target's distribution."""
        tested, rare = self._tested(), 1 + np.flatnonzero(self.expected[1:] < ENOUGH)
        off = (self.observed - self.expected)[tested]
        distance = off @ np.linalg.solve(self.covariance[np.ix_(tested, tested)], off)
        too_many = chernoff(float(self.observed[rare].sum()), float(self.expected[rare].sum()))
        return min(1.0, 2 * chi_square_tail(float(distance), len(tested)), 2 * too_many)

    def _tested(self) -> np.ndarray:
        """Not the first class, as it follows from the others, and none whose count is too small to be normal."""
        return 1 + np.flatnonzero(self.expected[1:] >= ENOUGH)


def chi_square_tail(x: float, freedom: int) -> float:
    """The chance that a chi-square variable of so many degrees of freedom is larger than x."""
    if freedom == 0 or x <= 0:
        return 1.0
    a, tail = (1.0, math.exp(-x / 2)) if freedom % 2 == 0 else (0.5, math.erfc(math.sqrt(x / 2)))
    while a < freedom / 2:
        tail += math.exp(a * math.log(x / 2) - x / 2 - math.lgamma(a + 1))
        a += 1
    return tail


def chernoff(seen: float, expected: float) -> float:
    """At most so likely are so many or more of things that are rare and known to be expected so often.

    One is always expected: rounding moves a token across the edge of a filter now and then.
    """
    expected = max(expected, 1.0)
    return math.exp(seen - expected - seen * math.log(seen / expected)) if seen > expected else 1.0
