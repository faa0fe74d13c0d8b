"""What drafting is worth on this machine: every depth and mlx-lm's plain decoding, side by side in one process.

One repeat runs every arm once, one after the other, over the same prompts, so that a machine that slows down as it
gets warm does so for all of them. The first repeat is not counted: kernels are still being built.
"""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.generate import GenerationResponse, wired_limit
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from mtp_mlx.cache import RecurrentCache
from mtp_mlx.choosing import Rules
from mtp_mlx.conversation import in_chat_template
from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.generation import Response, encode
from mtp_mlx.ngram import NOBODY
from mtp_mlx.options import DEFAULT_PREFILL_STEP
from mtp_mlx.programs import compiles
from mtp_mlx.sampling import choose_sampler
from mtp_mlx.sequence import Sequence
from mtp_mlx.stats import Stats
from mtp_mlx.types import Pair, Target

PEER, PLAIN, AUTO = "mlx-lm", "depth 0", "depth auto"  # arms that mean something by themselves
WORTH = 1.03  # the ratio from which drafting is said to pay; below it is noise
COST_ROUNDS = 7  # of every kind, for the table of costs

Watch = Callable[[str], None]  # told what is being done


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    prompts: list[list[int]]
    depths: list[int]  # besides 0 and auto
    tokens: int  # of each text at most
    repeats: int  # that are counted
    temperature: float = 0.0


def measure(pair: Pair, tokenizer: TokenizerWrapper, folder: Path, plan: Plan, watch: Watch) -> "Comparison":
    """Compare every depth of a pair with plain decoding and with mlx-lm's, on the checkpoint in `folder`.

    Raises RequestError for texts too short to be timed.
    """
    depths = [depth for depth in plan.depths if 0 < depth <= pair.drafter.limit]
    wanted: list[int | str] = [0, *depths, "auto"]
    arms = [ours(pair, tokenizer, depth, plan.tokens, plan.temperature) for depth in wanted]
    notes = []
    try:
        arms.insert(0, peer(peer_model(folder, pair.target), tokenizer, plan.tokens, plan.temperature))
        notes += _peer_notes(pair.target)
    except CheckpointError as error:
        notes.append(str(error))
    results = compare(arms, plan.prompts, plan.repeats, watch)
    spent = costs(pair, plan.prompts[0], depths, [1, *(k + 1 for k in depths)], COST_ROUNDS)
    return Comparison(results, spent, tuple(notes))


@dataclass(frozen=True)
class Comparison:
    """Every arm beside the others."""

    results: Mapping[str, "Result"]
    costs: "Costs"
    notes: tuple[str, ...] = ()  # what a reader has to know

    @property
    def base(self) -> "Result":
        """The fastest plain decoder, which is what drafting has to beat."""
        plain = [self.results[name] for name in (PEER, PLAIN) if name in self.results]
        return max(plain, key=lambda result: result.speed)

    def ratio(self, result: "Result") -> float:
        return result.speed / self.base.speed

    def verdict(self) -> str:
        """What the figures mean, in one line."""
        auto = self.results[AUTO]
        chosen = f"auto uses depth {auto.depth} and runs at {self.ratio(auto):.2f}x"
        named = PEER if self.base.arm == PEER else "plain decoding"
        drafted = [result for name, result in self.results.items() if name not in (PEER, PLAIN, AUTO)]
        if not drafted:
            return f"there is no drafter, so nothing to gain over {named}; {chosen}"
        best = max(drafted, key=lambda result: result.speed)
        k = best.depth
        if self.ratio(best) >= WORTH:
            return f"{self.ratio(best):.2f}x over {named} on this machine; depth {k}; {chosen}"
        steps = self.costs.rows(k + 1) + k * self.costs.draft_step
        return (
            f"drafting does not pay here: a round with {k} drafts costs {steps:.1f} plain steps and brings "
            f"{best.tokens_per_round:.1f} tokens, {self.ratio(best):.2f}x {named}; {chosen}"
        )

    def strangers(self) -> list[str]:
        """The arms that wrote anything else than plain decoding did; at temperature 0 there should be none."""
        return [name for name, result in self.results.items() if not result.wrote_as(self.results[PLAIN])]

    def figures(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "verdict": self.verdict(),
            "notes": list(self.notes),
            "other_text_than_depth_0": self.strangers(),
            "costs": self.costs.figures(),
            "arms": {name: result.figures() | self._beside(result) for name, result in self.results.items()},
        }

    def _beside(self, result: "Result") -> dict[str, Any]:
        """An arm compared with the two plain ones, and with what the costs of its rounds allow."""
        gain = result.speed / self.results[PLAIN].speed
        row: dict[str, Any] = {"against_depth_0": round(gain, 3)}
        if PEER in self.results:
            theirs = self.results[PEER]
            row["against_mlx_lm"] = round(result.speed / theirs.speed, 3)
            row["same_text_as_mlx_lm"] = result.wrote_as(theirs)
        if result.arm not in (PEER, PLAIN, AUTO):
            bound = self.costs.bound(result.depth, result.tokens_per_round)
            row |= {"bound": round(bound, 3), "reached": round(gain / bound, 3)}
        return row


@dataclass(frozen=True)
class Text:
    """What an arm wrote after one prompt, and how fast."""

    tokens: tuple[int, ...]
    timed: int  # the tokens that came after the first round ...
    seconds: float  # ... and the time they took
    ttft_seconds: float  # from the request to the first token
    peak: int = 0  # bytes, without what was held before
    rounds: tuple[tuple[int, int], ...] = ()  # own drafts and accepted ones of every round, where that is known
    stats: Stats | None = None


@dataclass(frozen=True)
class Arm:
    """One way to decode."""

    name: str
    write: Callable[[list[int], int], Text]  # from a prompt and a seed, up to the text's natural end


def ours(
    pair: Pair, tokenizer: TokenizerWrapper, depth: int | str, tokens: int, temperature: float = 0.0, **more: Any
) -> Arm:
    """This package at a depth; `more` goes to `stream_generate`. Only "auto" may copy from earlier text.

    Drafts are coupled, so that all depths write the same text and can be compared.
    """
    options = {"depth": depth, "lookup": depth == "auto", "drafts": "coupled"} | more

    def write(prompt: list[int], seed: int) -> Text:
        mx.random.seed(seed)
        sampler = choose_sampler(temperature, 1.0, 0.0, 0)
        return timed(stream_generate(pair, tokenizer, prompt, tokens, sampler=sampler, **options))

    return Arm(f"depth {depth}", write)


def peer(model: nn.Module, tokenizer: TokenizerWrapper, tokens: int, temperature: float = 0.0) -> Arm:
    """mlx-lm's own plain decoding."""

    def write(prompt: list[int], seed: int) -> Text:
        mx.random.seed(seed)
        return timed(mlx_lm.stream_generate(model, tokenizer, prompt, tokens, sampler=make_sampler(temperature)))

    return Arm(PEER, write)


def timed(responses: Iterable[GenerationResponse]) -> Text:
    """Let a text be written, one response per token, and time it."""
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    tokens: list[int] = []
    counts = [(0, 0)]  # drafts of the drafter's own, and accepted ones, after every round
    stats, opening = None, 0
    began = first = last = time.perf_counter()
    for response in responses:
        last = time.perf_counter()
        tokens.append(response.token)
        if isinstance(response, Response):
            stats = response.stats
            if stats.rounds == len(counts):
                counts.append((stats.drafted - stats.copied, stats.accepted - stats.copied_accepted))
        if len(tokens) == 1 or (stats is not None and stats.rounds == 1):
            first, opening = last, len(tokens)
    each = tuple((b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(counts))
    peak = mx.get_peak_memory() - held
    return Text(tuple(tokens), len(tokens) - opening, last - first, first - began, peak, each, stats)


def peer_model(folder: Path, target: Target) -> nn.Module:
    """A checkpoint as mlx-lm loads it, over the target's own arrays where all names and shapes agree.

    So no weight is held twice, and both compute with the same values. Raises CheckpointError where mlx-lm cannot
    load it.
    """
    assert isinstance(target, nn.Module)
    try:
        model, _ = load_model(folder, lazy=True)
    except Exception as error:  # mlx-lm raises nearly anything
        raise CheckpointError(f"mlx-lm cannot load {folder}: {type(error).__name__}: {error}") from error
    held: dict[str, mx.array] = dict(tree_flatten(target.parameters()))
    wanted: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    shared = {name: held[own] for name in wanted if (own := name.removeprefix("language_model.")) in held}
    if all(name in shared and shared[name].shape == array.shape for name, array in wanted.items()):
        model.load_weights(list(shared.items()))
    mx.eval(model.parameters())
    return model


def _peer_notes(target: Target) -> list[str]:
    """What a reader has to know before comparing with mlx-lm on this device."""
    recurrent = any(isinstance(layer, RecurrentCache) for layer in target.make_cache().layers)
    if recurrent and mx.default_device() == mx.cpu:
        return [
            "on the CPU mlx-lm runs this family's recurrence as a loop in Python, token by token: slow with prompts"
        ]
    return []


@dataclass(frozen=True)
class Acceptance:
    """Drafts of many rounds, counted by position."""

    made: tuple[int, ...]  # rounds that drafted this far
    reached: tuple[int, ...]  # of those, rounds in which every draft before was right
    kept: tuple[int, ...]  # of those, rounds in which this one was right too

    @classmethod
    def of(cls, rounds: Iterable[tuple[int, int]]) -> "Acceptance":
        """From drafted and accepted of every round."""
        each = list(rounds)
        places = range(max((drafted for drafted, _ in each), default=0))
        return cls(
            tuple(sum(drafted > j for drafted, _ in each) for j in places),
            tuple(sum(drafted > j and accepted >= j for drafted, accepted in each) for j in places),
            tuple(sum(accepted > j for _, accepted in each) for j in places),
        )

    def figures(self) -> dict[str, list[float | None]]:
        """Shares of all drafts made at a position, and of those that were reached."""
        return {
            "accepted_per_position": _shares(self.kept, self.made),
            "accepted_if_reached": _shares(self.kept, self.reached),
        }


def _shares(parts: Iterable[int], wholes: Iterable[int]) -> list[float | None]:
    return [round(part / whole, 3) if whole else None for part, whole in zip(parts, wholes, strict=True)]


@dataclass(frozen=True)
class Result:
    """All that an arm wrote."""

    arm: str
    repeats: tuple[tuple[Text, ...], ...]  # every counted repeat, every prompt

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of every repeat."""
        return [_speed(texts) for texts in self.repeats]

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    @property
    def ttft_seconds(self) -> float:
        return statistics.median(text.ttft_seconds for text in self.texts)

    @property
    def texts(self) -> list[Text]:
        return [text for texts in self.repeats for text in texts]

    @property
    def rounds(self) -> int:
        """Rounds after the first of every text."""
        return sum(max(len(text.rounds) - 1, 0) for text in self.texts)

    @property
    def tokens_per_round(self) -> float:
        """After the first round of every text, in which some drafters have nothing to draft from."""
        return sum(text.timed for text in self.texts) / self.rounds if self.rounds else 1.0

    @property
    def depth(self) -> int:
        """Drafts per round, as chosen by the end of the last text."""
        stats = self.texts[-1].stats
        return stats.depth if stats else 0

    def wrote_as(self, other: "Result") -> bool:
        """Whether every text, in every repeat, has the tokens that the other wrote in its first."""
        first = [text.tokens for text in other.repeats[0]]
        return all([text.tokens for text in texts] == first for texts in self.repeats)

    def figures(self) -> dict[str, Any]:
        """The figures for a JSON file."""
        stats = self.texts[-1].stats
        return {
            "tokens_per_second": round(self.speed, 3),
            "repeats": [round(speed, 3) for speed in self.speeds],
            "ttft_seconds": round(self.ttft_seconds, 4),
            "peak_bytes": max(text.peak for text in self.texts),
            "tokens_per_round": round(self.tokens_per_round, 3),
            **Acceptance.of(one for text in self.texts for one in text.rounds).figures(),
            "depth": self.depth,
            "depth_reason": stats.depth_reason if stats else "plain decoding",
        }


def _speed(texts: Collection[Text]) -> float:
    return sum(text.timed for text in texts) / sum(text.seconds for text in texts)


def compare(arms: list[Arm], prompts: list[list[int]], repeats: int, watch: Watch) -> dict[str, Result]:
    """What every arm writes after every prompt, `repeats` times over, by name.

    Raises RequestError for texts too short to be timed.
    """
    written: dict[str, list[tuple[Text, ...]]] = {arm.name: [] for arm in arms}
    for repeat in range(repeats + 1):
        for arm in arms:
            texts = tuple(arm.write(prompt, seed) for seed, prompt in enumerate(prompts))
            if not any(text.timed for text in texts):
                raise RequestError(f"{arm.name} ends every text within its first round; allow more tokens")
            watch(f"repeat {repeat} of {repeats}, {arm.name}: {_speed(texts):.1f} tok/s")
            if repeat:
                written[arm.name].append(texts)
    return {name: Result(name, tuple(texts)) for name, texts in written.items()}


@dataclass(frozen=True)
class Costs:
    """Median seconds of whole rounds in a dependent chain: each reads the token that the one before brought."""

    verify: Mapping[int, float]  # by rows M = k + 1, with drafts that cost nothing
    whole: Mapping[int, float]  # by drafts k, with the pair's own drafter

    def rows(self, count: int) -> float:
        """C(M)/C(1): a block of that many rows in plain steps."""
        return self.verify[count] / self.verify[1]

    @property
    def draft_step(self) -> float:
        """One draft step in plain steps, from the deepest round; 0 without a drafter."""
        k = max(self.whole, default=0)
        return max(0.0, self.whole[k] - self.verify[k + 1]) / (k * self.verify[1]) if k else 0.0

    def bound(self, k: int, tokens_per_round: float) -> float:
        """The speed-up over plain decoding that these costs allow."""
        return tokens_per_round / (self.rows(k + 1) + k * self.draft_step)

    def figures(self) -> dict[str, Any]:
        """The figures for a JSON file."""
        return {
            "plain_step_ms": round(1e3 * self.verify[1], 3),
            "rows": {M: round(self.rows(M), 3) for M in self.verify},
            "draft_step": round(self.draft_step, 4),
            "round_ms": {k: round(1e3 * seconds, 3) for k, seconds in self.whole.items()},
        }


def costs(pair: Pair, prompt: list[int], depths: Iterable[int], widths: Iterable[int], repeats: int) -> Costs:
    """Time rounds with so many drafts and blocks of so many rows after a prompt, interleaved."""
    free, own = opened(replace(pair, drafter=NOBODY), prompt), opened(pair, prompt)
    verify: dict[int, list[float]] = {rows: [] for rows in widths}
    whole: dict[int, list[float]] = {k: [] for k in depths if k}
    assert isinstance(pair.target, nn.Module)
    with wired_limit(pair.target):
        for _ in range(repeats + 1):  # the first one builds kernels
            for rows, times in verify.items():
                times.append(steady(free, rows - 1, free=True))
            for k, times in whole.items():
                times.append(steady(own, k))
    medians = [{key: statistics.median(times[1:]) for key, times in group.items()} for group in (verify, whole)]
    return Costs(*medians)


def opened(pair: Pair, prompt: list[int]) -> Sequence:
    """A sequence that has read a prompt and its first round, from which some drafters learn where they are."""
    sequence = Sequence(pair, Rules())
    sequence.prefill(prompt, DEFAULT_PREFILL_STEP, lambda done, total: None)
    sequence.round(0)
    return sequence


def steady(sequence: Sequence, k: int, *, free: bool = False) -> float:
    """Seconds of a round with k drafts, which are the drafter's, or cost nothing and are next to never right.

    It is the second of two: the first after a change of width may pay for other buffers.
    """
    seconds = 0.0
    for _ in range(2):
        nonsense = [(sequence.text[-1] + 1 + j) % sequence.pair.target.vocabulary for j in range(k)]
        began = time.perf_counter()
        sequence.round(nonsense if free else k)
        seconds = time.perf_counter() - began
    return seconds


# Of the kinds of text that people decode; for a model with a chat template, and for one that goes on with a text.
ASKED = {
    "code": "Write a Python class for a binary search tree with insert, search and in-order traversal.",
    "prose": "Explain to a curious ten-year-old why the sky is blue and sunsets are red.",
    "edit": "Return this function with every variable renamed to something telling, and nothing else changed:\n"
    "def f(a, b):\n    c = []\n    for d in a:\n        if d in b:\n            c.append(d)\n    return c",
    "json": "List the eight planets as a JSON array of objects with name, radius_km, moons and has_rings.",
}
BEGUN = {
    "code": "class Tree:\n    def __init__(self):\n        self.root = None\n\n    def insert(self, key):\n",
    "tests": "import unittest\n\n\nclass TestStack(unittest.TestCase):\n    def test_push(self):\n",
    "prose": "This module provides functions to read and write files. The following example shows how",
    "numbers": "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\n\ndef lcm(a, b):\n",
}


def prompts(tokenizer: TokenizerWrapper) -> dict[str, list[int]]:
    """Token ids of a prompt of each kind."""
    texts = ASKED if tokenizer.has_chat_template else BEGUN
    return {kind: encode(tokenizer, in_chat_template(tokenizer, text)) for kind, text in texts.items()}


def machine() -> dict[str, Any]:
    """What figures were measured on: processor, device, versions, and what decides the speed of MLX there."""
    device = mx.default_device()
    return {
        "processor": _processor(),
        "device": str(device),
        "device_name": str(mx.device_info().get("device_name", "")),
        "os": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("mtp-mlx", "mlx", "mlx-lm")},
        "preloaded_blas": _preloaded_blas(),
        "compiles": compiles(),
    }


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def _preloaded_blas() -> str | None:
    """The name of an OpenBLAS in this process: MLX's Linux wheel brings the reference BLAS, numpy one for itself."""
    maps = Path("/proc/self/maps")
    paths = maps.read_text().split() if maps.is_file() else []
    found = (Path(path).name for path in paths if "numpy" not in path)
    return next((name for name in found if name.startswith("libopenblas")), None)


def precision(target: Target) -> mx.Dtype:
    """What a target computes in; its weights may be quantised."""
    return target.embed(mx.array([[0]])).dtype
