"""What a sequence has made of a text, taken out so that another one can go on from there.

Keys and values of every token are cut to the tokens read, and shared by all snapshots whose texts begin alike: each
holds a part of its own behind those of the snapshot it goes on from. Rings, recurrent states and what a drafter knows
are right at one place only and are held whole. Nothing of it lies in a buffer that anybody writes.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mtp_mlx.cache import MAX_BLOCK
from mtp_mlx.choosing import Callables, Rules
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Held, Pair, Span, State

# The last rows of a text may be written once more by whoever goes on: Qwen's head pairs a token with the one after it,
# a draft model reads its newest block late. So a part begins so many tokens before the end of the one before it.
OVERLAP = MAX_BLOCK


@dataclass(frozen=True, eq=False)
class Part:
    """Keys and values of a run of tokens, for every layer that holds them token by token."""

    start: int
    rows: list[Any]  # for each layer: arrays (1, H, tokens, *) or lists of them

    @cached_property
    def nbytes(self) -> int:
        return _bytes(self.rows)

    def until(self, end: int) -> list[Any]:
        """The rows of tokens start .. end-1."""
        return cast(list[Any], tree_map(lambda rows: rows[:, :, : end - self.start], self.rows))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A sequence at the point at which it has read `tokens` and nothing else."""

    tokens: list[int]
    parts: tuple[Part, ...]  # in the order of time, each beginning at most OVERLAP tokens before the last one's end
    whole: list[Any]  # for each layer what cannot be cut
    state: State  # the drafter's
    ready: bool  # whether the drafter has been told of the last token

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes held, those of parts that are shared included."""
        return sum(part.nbytes for part in self.parts) + self.own_nbytes

    @cached_property
    def own_nbytes(self) -> int:
        """Bytes held beside the parts."""
        return _bytes([self.whole, list(self.state)])

    @property
    def cuttable(self) -> bool:
        """Whether it can be cut to fewer tokens: if it is nothing but keys and values of every token."""
        return not tree_flatten([self.whole, list(self.state)])

    def until(self, end: int) -> "Snapshot":
        """The same after fewer tokens, with the same parts. Only where it is cuttable."""
        assert self.cuttable and 0 < end <= self.length
        parts = tuple(part for part in self.parts if part.start < end)
        return replace(self, tokens=self.tokens[:end], parts=parts)

    def compute(self) -> None:
        """Make the copies, if they have not been made yet; until then the sequence must not go on."""
        mx.eval([part.rows for part in self.parts], self.whole, self.state)

    def held(self) -> Held:
        """All of it, each token's rows once: those of the latest part that has them."""
        ends = [part.start for part in self.parts[1:]] + [self.length]
        rows = [part.until(end) for part, end in zip(self.parts, ends, strict=True)]
        if len(rows) == 1:
            return Held(rows[0], self.whole)
        return Held(cast(list[Any], tree_map(_joined, *rows)), self.whole)

    def is_like(self, blank: "Snapshot") -> bool:
        """Whether every array has the shape and dtype that it would have if the text had been read at once."""
        starts = [part.start for part in self.parts]
        ends = [*starts[1:], blank.length]
        return (
            self.length == blank.length
            and starts[:1] == [0]
            and all(start < end for start, end in pairwise([*starts, blank.length]))
            and all(_reach(part, end, blank.parts[0]) for part, end in zip(self.parts, ends, strict=True))
            and _shapes(self.whole) == _shapes(blank.whole)
            # One that is not told of a prompt knows nothing before its first round.
            and (_shapes(list(self.state)) == _shapes(list(blank.state)) or not (self.ready or self.state))
        )


def take(sequence: Sequence, base: Snapshot | None = None) -> Snapshot:
    """A snapshot of a sequence that has read something, at its present length.

    With a `base`, one of this text at an earlier point, it shares the parts of that.
    """
    snapshot = outline(sequence, base)
    snapshot.compute()
    return snapshot


def outline(sequence: Sequence, base: Snapshot | None = None) -> Snapshot:
    """The same without making the copies: its size is known, `compute` does the rest."""
    sequence.commit()
    end = sequence.length
    assert end > 0, "nothing has been read yet"
    assert base is None or sequence.text[: base.length] == base.tokens, "the base is of another text"
    start = max(0, base.length - OVERLAP) if base else 0
    earlier = [part for part in base.parts if part.start < start] if base else []
    rows, whole = sequence.cache.snapshot(start, end)
    return Snapshot(sequence.text[:end], (*earlier, Part(start, rows)), whole, sequence.state, sequence.ready)


def blank(pair: Pair, length: int) -> Snapshot:
    """A snapshot of any text of so many tokens, of which only shapes and dtypes mean anything: nothing is computed.

    The pair builds what reading two tokens would be, drafter included, and the layers what they would give out after
    all of them; nobody asks for the values. On a CPU a recurrent layer builds a step for each token: two are enough.
    """
    cache, read = pair.make_cache(), min(length, 2)
    state = pair.drafter.start(cache)
    cache.reserve(read)
    tokens, span = mx.zeros((1, read), mx.int32), Span(0, read)
    output = pair.target(tokens, cache, span)
    state = pair.drafter.advance(state, cache, tokens, span, output.hidden, mx.array([read - 1]))
    cache.commit(read)
    rows, whole = cache.snapshot(0, length)
    return Snapshot([0] * length, (Part(0, rows),), whole, tuple(state), True)


def restore(
    pair: Pair, chooser: Rules | Callables, snapshot: Snapshot, last: int, seed: int = 0, room: int = 0
) -> Sequence:
    """A sequence with buffers of its own that goes on from a snapshot, taken with the same pair.

    `last` is the token after those of the snapshot, which the sequence will read next. `room` is how many tokens are
    known to follow altogether, so that buffers need not grow while a prompt is read.
    """
    sequence = Sequence(pair, chooser, seed)
    end = snapshot.length
    sequence.cache.reserve(max(end + 1, room))
    sequence.cache.restore(snapshot.held(), end)
    sequence.text = [*snapshot.tokens, last]
    sequence.batch.state, sequence.batch.ready = snapshot.state, snapshot.ready
    mx.eval(sequence.cache.arrays(), sequence.state)
    return sequence


def _joined(*rows: mx.array) -> mx.array:
    return mx.concatenate(list(rows), axis=2)


def _bytes(arrays: list[Any]) -> int:
    return sum(array.nbytes for array in dict[str, mx.array](tree_flatten(arrays)).values())


def _shapes(arrays: list[Any]) -> dict[str, tuple[Any, ...]]:
    found: dict[str, mx.array] = dict(tree_flatten(arrays))
    return {name: (array.shape, array.dtype) for name, array in found.items()}


def _reach(part: Part, end: int, blank: Part) -> bool:
    """Whether a part has rows like those of another one, up to `end` at least."""
    mine, theirs = _shapes(part.rows), _shapes(blank.rows)
    return mine.keys() == theirs.keys() and all(
        len(shape) == 4
        and part.start + shape[2] >= end
        and (*shape[:2], *shape[3:], dtype) == (*other[:2], *other[3:], same)
        for (shape, dtype), (other, same) in ((mine[name], theirs[name]) for name in mine)
    )
