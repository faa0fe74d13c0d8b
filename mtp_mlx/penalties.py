"""Changes to logits before anything is chosen: bias, and penalties on tokens that the text already has.

They are mlx-lm's logits processors for many rows at once, each with its own text before it, and equal them bit for
bit. Speculation needs them on every row of a block: row j follows the drafts before it.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.errors import RequestError


@dataclass(frozen=True)
class Penalties:
    """What is done to the logits, in mlx-lm's order: bias, repetition, presence, frequency.

    Repetition divides a positive and multiplies a negative logit (arXiv 1909.05858); presence is subtracted once,
    frequency as often as the token occurs. Each looks back as many tokens as its context, prompt included.
    Raises RequestError for a value outside its range.
    """

    repetition: float = 1.0  # 1: off
    repetition_context: int = 20
    presence: float = 0.0  # 0: off
    presence_context: int = 20
    frequency: float = 0.0  # 0: off
    frequency_context: int = 20
    bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit; -inf bans it

    def __post_init__(self) -> None:
        if not 0 < self.repetition < math.inf:
            raise RequestError(f"repetition penalty {self.repetition} must be a number above 0; 1 turns it off")
        for name, penalty in ("presence", self.presence), ("frequency", self.frequency):
            if not math.isfinite(penalty):
                raise RequestError(f"{name} penalty {penalty} must be a finite number; 0 turns it off")
        for name, context in (
            ("repetition", self.repetition_context),
            ("presence", self.presence_context),
            ("frequency", self.frequency_context),
        ):
            if context < 1:
                raise RequestError(f"{name} context {context} must be at least 1 token")
        self._check_bias()

    def __bool__(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.reach or self.bias)

    def __call__(self, logits: mx.array, recent: mx.array) -> mx.array:
        """Changed logits, (B, L, V) in their own dtype.

        `recent` (B, L, reach) holds the last tokens before the one that the row chooses, newest last, and -1
        where the text is shorter.
        """
        if self.bias:
            ids, values = zip(*self.bias, strict=True)
            logits = logits.at[..., mx.array(ids)].add(mx.array(values))
        if self.repetition != 1:
            logits = _repetition(logits, recent[..., -self.repetition_context :], self.repetition)
        if self.presence != 0:
            logits = _presence(logits, recent[..., -self.presence_context :], self.presence)
        if self.frequency != 0:
            logits = _frequency(logits, recent[..., -self.frequency_context :], self.frequency)
        return logits

    @property
    def reach(self) -> int:
        """How many tokens back the longest context looks; 0 if none is needed."""
        contexts = (
            (self.repetition != 1) * self.repetition_context,
            (self.presence != 0) * self.presence_context,
            (self.frequency != 0) * self.frequency_context,
        )
        return max(contexts)

    def check(self, vocabulary: int) -> None:
        """Raises RequestError for a bias on a token that a model with so many ids does not have."""
        for token, _ in self.bias:
            if token >= vocabulary:
                raise RequestError(f"logit bias for token {token}: the model's ids end at {vocabulary - 1}")

    def _check_bias(self) -> None:
        seen: set[int] = set()
        for token, value in self.bias:
            if token < 0:
                raise RequestError(f"logit bias for token {token}: ids are not negative")
            if token in seen:
                raise RequestError(f"logit bias for token {token} is given more than once")
            if not value < math.inf:
                raise RequestError(f"logit bias {value} for token {token} must be a number, or -inf to ban it")
            seen.add(token)


def windows(history: mx.array, block: mx.array) -> mx.array:
    """The last N tokens before each row's choice, (B, L, N), of a text (B, N) and the block (B, L) after it.

    Example with N = 3: history 7 8 9 and block 4 5 give 8 9 4 for the first row and 9 4 5 for the second.
    """
    N, L = history.shape[1], block.shape[1]
    text = mx.concatenate([history, block], axis=1)
    return text[:, mx.arange(L)[:, None] + mx.arange(1, N + 1)]


def _repetition(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    ids, known = _places(recent)
    old = mx.take_along_axis(logits, ids, axis=-1)  # (B, L, N)
    new = mx.where(old < 0, old * penalty, old / penalty)
    return mx.put_along_axis(logits, ids, mx.where(known, new, old), axis=-1)


def _presence(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    ids, known = _places(recent)
    old = mx.take_along_axis(logits, ids, axis=-1)  # (B, L, N)
    return mx.put_along_axis(logits, ids, mx.where(known, old - penalty, old), axis=-1)


def _frequency(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    B, L, _ = logits.shape
    rows = mx.arange(B)[:, None, None], mx.arange(L)[:, None]
    # Subtracted once for every occurrence, as in mlx-lm: in bfloat16 the rounding in between matters.
    amounts = mx.where(recent < 0, 0.0, penalty).astype(logits.dtype)
    return logits.at[*rows, mx.maximum(recent, 0)].subtract(amounts)


def _places(recent: mx.array) -> tuple[mx.array, mx.array]:
    """Ids to write to, (B, L, N), and which rows have a text at all, (B, L, 1).

    A missing token stands for the newest one, which is written anyway: writing the same value twice is harmless,
    and a value of its own for any other id might cover what a real token writes there.
    """
    newest = recent[..., -1:]
    return mx.maximum(mx.where(recent < 0, newest, recent), 0), newest >= 0
