"""Tiny checkpoints, and a drafter and a sampler that do as they are told."""

import io
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast
from unittest import mock

import mlx.core as mx

# Equality to the last token is a promise of the CPU backend; on a Mac too the tests run there. This has to come
# before mlx-lm is imported, which makes its stream for the default device once and for all.
mx.set_default_device(mx.cpu)
# On a CPU a trace is compiled with the system's C++ compiler, a second for each of hundreds of kernels. So tests run
# rounds as they are built; test_programs.py compares replayed rounds with those.
mx.disable_compile()
# MLX hands one small operation after the other to a thread of its own. Where Linux lets that thread interrupt this one
# each time, tests take half as long again; a sandbox may forbid to say so.
if sys.platform == "linux":
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from loopback import hub as hub  # a fixture
from mlx_lm.sample_utils import make_logits_processors

from mtp_mlx.accept import normalise
from mtp_mlx.batch import Batch
from mtp_mlx.cache import MAX_BLOCK, Cache
from mtp_mlx.choosing import Drafts, Rules
from mtp_mlx.cli.main import main
from mtp_mlx.loading import load
from mtp_mlx.models.gemma4 import Model as Gemma4
from mtp_mlx.models.gemma4_assistant import Assistant
from mtp_mlx.models.qwen3_5 import Model as Qwen
from mtp_mlx.models.qwen3_5_mtp import Head
from mtp_mlx.penalties import Penalties
from mtp_mlx.programs import Programs, compiles
from mtp_mlx.sampling import Greedy, Sampler
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Drafter, Output, Pair, Pick, PlainRows, Span, State, Target, Visible

# For a program in a process of its own, which would compile for a minute where the kernels are not there yet.
AS_BUILT = {**os.environ, "MLX_DISABLE_COMPILE": "1"}
needs_compiler = pytest.mark.xdist_group("compiler")  # two processes would compile the same kernels, into one folder


@pytest.fixture
def compiled() -> Iterator[None]:
    """mx.compile does what it does for a user."""
    mx.enable_compile()
    compiles.cache_clear()
    if not compiles():
        pytest.fail("mx.compile does nothing here; on Linux it needs g++")
    yield
    mx.disable_compile()
    compiles.cache_clear()


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """What a command does to the logger is undone."""
    log = logging.getLogger("mtp_mlx")
    level, handlers, propagate = log.level, log.handlers, log.propagate
    yield
    log.setLevel(level)
    log.handlers, log.propagate = handlers, propagate


FIXTURES = Path(__file__).parent / "fixtures"
VARIANTS = ["gemma4_ple", "gemma4_keqv", "gemma4_moe", "gemma4_unified"]
QWEN = ["qwen3_5_dense", "qwen3_5_tied", "qwen3_5_moe", "qwen3_5_moe_sharded", "qwen3_next"]
WINDOW = 16  # of every tiny variant of Gemma
VOCAB = 320


@pytest.fixture
def sizes() -> Iterator[list[int]]:
    """How many texts each round was of."""
    seen: list[int] = []
    plain = Batch.round

    def spied(self: Batch, *arguments: object) -> object:
        seen.append(len(self.sequences))
        return plain(self, *arguments)  # type: ignore[arg-type]

    with mock.patch.object(Batch, "round", spied):
        yield seen


@cache
def tiny(variant: str, drafter: str = "assistant") -> tuple[Gemma4, Assistant]:
    """A tiny released-format pair of tests/fixtures, in float32."""
    folder = FIXTURES / variant
    pair = load(folder, drafter=folder / drafter, dtype=mx.float32)[0].pair
    assert isinstance(pair.target, Gemma4) and isinstance(pair.drafter, Assistant)
    return pair.target, pair.drafter


@cache
def tiny_qwen(variant: str) -> tuple[Qwen, Head]:
    """A tiny released-format target of tests/fixtures with the head inside, in float32."""
    pair = load(FIXTURES / variant, dtype=mx.float32)[0].pair
    assert isinstance(pair.target, Qwen) and isinstance(pair.drafter, Head)
    return pair.target, pair.drafter


@cache
def tiny_pair(variant: str) -> tuple[Target, Drafter]:
    """A tiny pair of either family."""
    return tiny_qwen(variant) if variant in QWEN else tiny(variant)


def float32_copy(source: str | Path, folder: Path) -> Path:
    """A float32 copy of a fixture, or of a folder, for mlx-lm: it adds the 1 to Qwen's norms in that precision."""
    shutil.copytree(FIXTURES / source, folder)
    for file in folder.rglob("*.safetensors"):
        weights = mx.load(str(file))
        assert isinstance(weights, dict)
        wide = {name: array.astype(mx.float32) for name, array in weights.items()}
        mx.save_safetensors(str(file), wide, {"format": "pt"})
    return folder


@cache
def golden(variant: str) -> dict[str, np.ndarray]:
    """The values that torch and transformers computed for a variant."""
    with np.load(FIXTURES / variant / "golden.npz") as values:
        return dict(values)


def gap(mine: mx.array, theirs: mx.array | np.ndarray) -> float:
    """Largest absolute difference."""
    return float(np.abs(np.array(mine) - np.array(theirs)).max())


def mlx_lm_model(folder: Path) -> nn.Module:
    """The same checkpoint as mlx-lm loads it."""
    return mlx_lm.load(str(folder))[0]


def mlx_lm_processors(penalties: Penalties) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """What mlx-lm does for the same penalties."""
    processors: list[Callable[[mx.array, mx.array], mx.array]] = make_logits_processors(
        dict(penalties.bias),
        penalties.repetition,
        penalties.repetition_context,
        penalties.presence,
        penalties.presence_context,
        penalties.frequency,
        penalties.frequency_context,
    )
    return processors


def program(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """The command line within this process, where a start costs nothing."""
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "argv", ["mtp-mlx", *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        pytest.raises(SystemExit) as left,
    ):
        main()
    return subprocess.CompletedProcess(
        ["mtp-mlx", *arguments], int(left.value.code or 0), out.getvalue(), err.getvalue()
    )


def rows_of(visible: Visible) -> PlainRows:
    """What a cache shows, where it is not quantised."""
    assert isinstance(visible, PlainRows)
    return visible


def varied_tokens(length: int, seed: int = 0) -> list[int]:
    """Token ids without repetition patterns: a tiny random model left to itself may say one token forever."""
    return [int(token) for token in np.random.default_rng(seed).integers(4, VOCAB, length)]


@dataclass(frozen=True)
class DialledDrafter:
    """Drafts the true continuation, wrong at a chosen share of positions: every partial acceptance occurs."""

    truth: mx.array  # (T,) the sequence as plain decoding writes it
    wrong: mx.array  # (T,) bool
    limit: int = MAX_BLOCK - 1
    reads_prompt: bool = True
    nbytes: int = 0

    @classmethod
    def dial(cls, truth: list[int], hit_rate: float, seed: int = 0) -> "DialledDrafter":
        padded = truth + [0] * MAX_BLOCK  # the last rounds look past the end
        wrong = np.random.default_rng(seed).random(len(padded)) >= hit_rate
        return cls(mx.array(padded, mx.int32), mx.array(wrong))

    @classmethod
    def every_partial(cls, truth: list[int], prompt: int, k: int, seed: int = 0) -> "DialledDrafter":
        """At depth k, 0 to k drafts are right: each once in every k+1 rounds, in an order of the seed's."""
        random, wrong = np.random.default_rng(seed), list[int]()
        place = max(prompt, 2)  # of the first draft: after a prompt of one token comes a round without drafts
        while place < len(truth):
            for right in random.permutation(k + 1):
                wrong += [place + right] if right < k else []
                place += right + 1
        padded = truth + [0] * MAX_BLOCK
        return cls(mx.array(padded, mx.int32), mx.array(np.isin(np.arange(len(padded)), wrong)))

    def kv_bytes(self, tokens: int) -> int:
        return 0

    def reads(self, cache: Cache) -> int:
        return 0

    def start(self, cache: Cache) -> State:
        return ()

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        return ()

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        for j in range(k):
            place = cache.position[:, None] + 1 + j  # (B, 1)
            token = self.truth[place]
            pick(certain(mx.where(self.wrong[place], (token + 1) % VOCAB, token)))


def certain(token: mx.array) -> mx.array:
    """Logits (B, 1, V) of a drafter that is sure of its token (B, 1)."""
    return mx.where(mx.arange(VOCAB) == token[..., None], 0.0, -1e9)


@dataclass(frozen=True, eq=False)
class Forced:
    """A sampler that writes a given sequence, so that logits can be compared along a varied text."""

    tokens: mx.array  # (T,)

    def __call__(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        return self.tokens[keys[..., 1]]

    def law(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        return mx.where(mx.arange(logprobs.shape[-1]) == self(logprobs, keys)[..., None], 0.0, -mx.inf)


class Recorder:
    """A `Pick` that takes the best token, and remembers what it was shown."""

    def __init__(self) -> None:
        self.logits: list[mx.array] = []  # (1, 1, C) each
        self.ids: list[mx.array | None] = []
        self.tokens: list[mx.array] = []  # (1, 1) each

    def __call__(self, logits: mx.array, ids: mx.array | None = None) -> mx.array:
        best = mx.argmax(logits, axis=-1)
        token = best if ids is None else mx.take_along_axis(ids, best[..., None], axis=-1)[..., 0]
        self.logits.append(logits)
        self.ids.append(ids)
        self.tokens.append(token)
        return token

    @property
    def draft(self) -> list[int]:
        return cast(list[int], mx.concatenate(self.tokens, axis=1)[0].tolist())


class AlteredTarget:
    """A target with a shorter context, with its logits multiplied, or broken after one poisonous token."""

    def __init__(self, target: Target, context: int = 1024, factor: float = 1.0, poison: int = -1):
        self.target, self.context, self.factor, self.poison = target, context, factor, poison
        self.vocabulary = target.vocabulary

    @property
    def nbytes(self) -> int:
        return self.target.nbytes

    def kv_bytes(self, tokens: int, kv_bits: int | None = None) -> int:
        return self.target.kv_bytes(tokens, kv_bits)

    def make_cache(self, kv_bits: int | None = None) -> Cache:
        return self.target.make_cache(kv_bits)

    def embed(self, tokens: mx.array) -> mx.array:
        return self.target.embed(tokens)

    def __call__(self, tokens: mx.array, cache: Cache, span: Span) -> Output:
        output = self.target(tokens, cache, span)
        broken = mx.where(tokens == self.poison, float("nan"), 1.0)[..., None]
        return output._replace(logits=output.logits * self.factor * broken)


PROGRAMS = Programs()  # traced steps of the tiny models, for all tests


def open_sequence(
    target: Target,
    drafter: Drafter,
    sampler: Sampler,
    seed: int = 0,
    drafts: Drafts = "argmax",
    kv_bits: int | None = None,
) -> Sequence:
    """A sequence of which nothing has been read yet.

    Drafts are the drafter's best tokens: coupled ones would always agree with a sampler that writes a given text.
    """
    return Sequence(Pair(target, drafter, PROGRAMS, kv_bits), Rules(sampler, drafts=drafts), seed)


def drafted(sequence: Sequence, k: int) -> list[list[int]]:
    """What the drafter would propose now."""
    batch = sequence.batch
    return cast(list[list[int]], batch._propose(k, batch._groups()).tokens.tolist())


def run_rounds(
    target: Target,
    drafter: Drafter,
    sampler: Sampler,
    prompt: list[int],
    tokens: int,
    k: int,
    step: int = 2048,
    seed: int = 0,
    drafts: Drafts = "argmax",
    kv_bits: int | None = None,
) -> tuple[list[int], mx.array, list[int]]:
    """`tokens` tokens after a prompt at depth k: the tokens, their log-probability rows, drafts kept per round."""
    sequence = open_sequence(target, drafter, sampler, seed, drafts, kv_bits)
    sequence.prefill(prompt, step, lambda done, total: None)
    text: list[int] = []
    rows: list[mx.array] = []
    accepted: list[int] = []
    while len(text) < tokens:
        result = sequence.round(k if sequence.ready else 0)
        text += result.tokens
        rows.append(result.logprobs[: len(result.tokens)])
        accepted.append(result.accepted)
    return text[:tokens], mx.concatenate(rows)[:tokens], accepted


def one_pass(target: Target, text: list[int]) -> mx.array:
    """Log-probabilities after each token of a text that is read at once, (T, V)."""
    cache = target.make_cache()
    cache.reserve(len(text))
    return normalise(target(mx.array(text)[None], cache, Span(0, len(text))).logits)[0]


def plain(target: Target, prompt: list[int], tokens: int) -> list[int]:
    """Greedy plain decoding: the same loop with nothing drafted."""
    nobody = DialledDrafter.dial([], 0.0)
    return run_rounds(target, nobody, Greedy(), prompt, tokens, 0)[0]
