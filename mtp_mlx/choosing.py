"""How tokens are chosen: by the target at every row of a block, and by a drafter one after the other.

`Rules` are pure functions of device arrays and become a part of the traced round. `Callables` are what only the host
can run: mlx-lm's own kind of samplers and logits processors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx

from mtp_mlx.accept import accept, normalise
from mtp_mlx.agreement import ALONE, Agreement
from mtp_mlx.penalties import Penalties, windows
from mtp_mlx.sampling import DRAFT, Greedy, Sample, Sampler, draw, keys, stream
from mtp_mlx.types import Draft

Drafts = Literal["coupled", "argmax"] | Sample


@dataclass(frozen=True)
class Rules:
    """Penalties, then the sampler; and how drafts are drawn where the temperature is not 0.

    "coupled": by the target's own sampler with the target's own noise, so that both mostly agree. "argmax": the
    drafter's most probable token. A `Sample`: drawn with other noise from that sampler's distribution and tested by
    rejection sampling; then the text depends on the drafts, its distribution does not.
    """

    sampler: Sampler = field(default_factory=Greedy)
    penalties: Penalties = field(default_factory=Penalties)
    drafts: Drafts = "coupled"

    @property
    def rules(self) -> "Rules":
        return self

    @property
    def reach(self) -> int:
        """How many of the latest tokens decide over the next one."""
        return self.penalties.reach


class Group(NamedTuple):
    """Rows of a batch for which the same rules hold."""

    rules: Rules
    rows: tuple[int, ...]

    def of(self, array: mx.array) -> mx.array:
        """Its rows of an array (B, *)."""
        return array if len(self.rows) == array.shape[0] else array[mx.array(self.rows)]


class Context(NamedTuple):
    """What the choices of a group depend on beside the logits."""

    seed: mx.array  # (G,) uint32
    recent: mx.array  # (G, reach) int32, the tokens before the newest one; -1 before the text begins


class Picker:
    """Chooses drafted tokens one after the other, as the target will choose at the same positions."""

    def __init__(self, rules: Rules, context: Context, last: mx.array, position: mx.array, k: int, vocabulary: int):
        self._rules, self._recent, self._vocabulary = rules, context.recent, vocabulary
        self._keys = keys(context.seed, position[:, None] + 1 + mx.arange(k))  # (B, k, 2)
        self._block = last[:, None]  # (B, 1 + picked)
        self._laws: list[mx.array] = []

    def __call__(self, logits: mx.array, ids: mx.array | None = None) -> mx.array:
        j = self._block.shape[1] - 1
        penalties, drafts = self._rules.penalties, self._rules.drafts
        certain = drafts == "argmax" or isinstance(self._rules.sampler, Greedy)
        if certain and not penalties:
            best = mx.argmax(logits, axis=-1)
            token = best if ids is None else mx.take_along_axis(ids, best[..., None], axis=-1)[..., 0]
        else:
            rows = logits if ids is None else _spread(logits, ids, self._vocabulary)
            rows = normalise(penalties(rows, windows(self._recent, self._block)[:, -1:]))
            token = mx.argmax(rows, axis=-1) if certain else self._drawn(rows, self._keys[:, j : j + 1])
        token = token.astype(mx.int32)
        self._block = mx.concatenate([self._block, token], axis=1)
        return token

    def _drawn(self, rows: mx.array, key: mx.array) -> mx.array:
        if not isinstance(self._rules.drafts, Sample):
            return self._rules.sampler(rows, key)
        self._laws.append(self._rules.drafts.law(rows, key))
        return draw(self._laws[-1], stream(key, DRAFT))

    def draft(self) -> Draft:
        """All that has been picked."""
        return Draft(self._block[:, 1:], mx.concatenate(self._laws, axis=1) if self._laws else None)


class Pickers:
    """A picker for every group of a batch, as one."""

    def __init__(
        self,
        groups: Sequence[Group],
        contexts: Sequence[Context],
        last: mx.array,
        position: mx.array,
        k: int,
        vocabulary: int,
    ):
        self._groups = groups
        self._pickers = [
            Picker(group.rules, Context(*context), group.of(last), group.of(position), k, vocabulary)
            for group, context in zip(groups, contexts, strict=True)
        ]
        order = [row for group in groups for row in group.rows]
        self._places = mx.array([order.index(row) for row in range(len(order))])

    def __call__(self, logits: mx.array, ids: mx.array | None = None) -> mx.array:
        parts = [
            pick(group.of(logits), None if ids is None else group.of(ids))
            for group, pick in zip(self._groups, self._pickers, strict=True)
        ]
        return self._in_order(parts)

    def tokens(self) -> mx.array:
        """All that has been picked, (B, k)."""
        return self._in_order([pick.draft().tokens for pick in self._pickers])

    def laws(self) -> list[list[mx.array]]:
        """What each group's tokens were drawn from, (G, k, V), or nothing where they were not drawn by chance."""
        laws = [pick.draft().logprobs for pick in self._pickers]
        return [[] if law is None else [law] for law in laws]

    def _in_order(self, parts: list[mx.array]) -> mx.array:
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)[self._places]


def _spread(logits: mx.array, ids: mx.array, vocabulary: int) -> mx.array:
    """Scores of candidates as a row over the whole vocabulary."""
    nowhere = mx.full((*logits.shape[:-1], vocabulary), -mx.inf, logits.dtype)
    return mx.put_along_axis(nowhere, ids.astype(mx.int32), logits, axis=-1)


class Choice(NamedTuple):
    """What became of a block."""

    tokens: list[int]  # the kept drafts, then one token of the target's own
    likely: bool  # whether the first draft was the target's most probable token, whatever was drawn
    sound: bool  # whether every chosen token has a finite log-probability
    logprobs: mx.array  # (len(tokens) or more, V)


def masked(logits: mx.array, masks: mx.array | None) -> mx.array:
    """Logits (..., V) where bit v % 32 of word v // 32 is set in masks (..., V / 32 or more) uint32, else -inf."""
    if masks is None:
        return logits
    bits = (masks[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return mx.where(bits.flatten(-2)[..., : logits.shape[-1]] != 0, logits, -mx.inf)


def verdict(
    rules: Rules,
    context: Context,
    draft: Draft,
    block: mx.array,
    start: mx.array,
    logits: mx.array,
    masks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The host's report, (B, 2 + 1 + k+1) int32, and log-probabilities (B, k+1, V), for logits (B, k+1, V).

    Masks come behind penalties, which may change what is forbidden, and before filters, which have to see what is left.
    """
    rows = block.shape[1]
    logprobs = normalise(masked(rules.penalties(logits, windows(context.recent, block)), masks))
    kept = accept(draft, logprobs, keys(context.seed, start[:, None] + 1 + mx.arange(rows)), rules.sampler)
    # Rows after the first wrong draft continue a text that nobody wrote; their logits may be as they like.
    finite = mx.isfinite(mx.take_along_axis(logprobs, kept.tokens[..., None], axis=-1))[..., 0]
    sound = (finite | (mx.arange(rows) > kept.count[:, None])).all(axis=-1)
    likely = (mx.argmax(logprobs[:, :1], axis=-1) == draft.tokens[:, :1]).any(axis=-1)
    flags = mx.stack([sound, likely, kept.count], axis=-1).astype(mx.int32)
    return mx.concatenate([flags, kept.tokens], axis=-1), logprobs


def read(report: mx.array, logprobs: mx.array) -> list[Choice]:
    """What the host makes of `verdict`, a choice for every row: the one read of a round."""
    rows = cast(list[list[int]], report.tolist())
    return [
        Choice(tokens[: count + 1], bool(likely), bool(sound), logprobs[row])
        for row, (sound, likely, count, *tokens) in enumerate(rows)
    ]


@dataclass(frozen=True)
class Callables:
    """A sampler, or logits processors, of mlx-lm's kind: opaque functions, perhaps with a state of their own.

    They are called as plain decoding would call them, for one kept row after the other with the text before it; a
    row behind a wrong draft is never shown to them. So nothing has to be known of them, and a state that they keep
    stays right. It costs one more wait for every kept token.
    """

    sampler: Sampler | Callable[[mx.array], mx.array]  # ours, or (1, V) log-probabilities -> (1,)
    processors: Sequence[Callable[[mx.array, mx.array], mx.array]] = ()  # (tokens so far, (1, V) logits) -> logits
    stops: frozenset[int] = frozenset()  # tokens that end the text: after one of them nobody is asked

    @property
    def rules(self) -> Rules:
        """How a drafter should draw."""
        return Rules(self.sampler if isinstance(self.sampler, Greedy | Sample) else Greedy())

    def choose(
        self,
        seed: mx.array,
        text: list[int],
        draft: list[int],
        logits: mx.array,
        masks: mx.array | None = None,
        agreed: Agreement = ALONE,
    ) -> Choice:
        """Choose for the rows of logits (k+1, V) that follow `text`, as long as the choice equals the draft.

        Tokens of the text that nobody knows, -1, are not shown to processors.

        `masks` (k+1, V / 32 or more) are of tokens that a grammar allows, whatever processors made of them.
        """
        rows: list[mx.array] = []
        tokens: list[int] = []
        so_far = mx.array([token for token in text if token >= 0], mx.int32)
        for j, drafted in enumerate([*draft, None]):
            row = logits[j : j + 1]
            for processor in self.processors:
                row = processor(so_far, row)
            rows.append(normalise(masked(row, None if masks is None else masks[j : j + 1])))
            tokens += agreed.ids([self._draw(rows[-1], seed, len(text) + j)])
            if tokens[-1] != drafted or drafted in self.stops:
                break
            so_far = mx.concatenate([so_far, mx.array(tokens[-1:], mx.int32)])
        likely = bool(draft) and mx.argmax(rows[0]).item() == draft[0]
        logprobs = mx.concatenate(rows)
        chosen = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=-1)
        return Choice(tokens, likely, bool(mx.isfinite(chosen).all().item()), logprobs)

    def _draw(self, row: mx.array, seed: mx.array, position: int) -> int:
        if isinstance(self.sampler, Greedy | Sample):
            token = self.sampler(row[None], keys(seed, mx.array([[position]])))
        else:
            token = cast(Any, self.sampler)(row)
        return cast(int, token.item())
