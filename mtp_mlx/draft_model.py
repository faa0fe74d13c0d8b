"""A small model of the target's own family as its drafter: classic speculative decoding.

Source: Leviathan, Kalman, Matias 2023 (arXiv 2211.17192). It is a `Target` like the one it drafts for, sliding and
recurrent layers included, with a cache of its own beside the target's.
"""

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mtp_mlx.cache import MAX_BLOCK, Cache, RecurrentCache, taken
from mtp_mlx.types import Held, LayerCache, Pick, Span, State, Target


class Aside:
    """A draft model's own cache, as one more layer of the target's: it grows with it and is traced with it.

    Rows that the target has kept are not read at once, but together with the token that the next draft begins with:
    the weights are read once for both.
    """

    def __init__(self, cache: Cache):
        self.cache = cache
        self.unread: tuple[mx.array, mx.array] | None = None  # (B, L) tokens, of which the first (B,) + 1 are kept

    def reserve(self, rows: int) -> None:
        """An unread block is read with one more token behind it, where the target has no room to spare perhaps."""
        for layer in self.cache.layers:  # not through the cache, which would round up what has been rounded up
            layer.reserve(rows + 1)

    def commit(self, count: mx.array | int) -> None:
        """Nothing to do: the drafter learns of what is kept by `advance`."""

    def arrays(self) -> list[Any]:
        return [self.cache.arrays(), list(self.unread or ())]

    def bind(self, arrays: list[Any]) -> None:
        held, unread = arrays
        self.cache.bind(held)
        self._leave(unread)

    def join(self, other: LayerCache, sizes: tuple[int, int]) -> None:
        assert isinstance(other, Aside)
        length = max(_length(self.unread), _length(other.unread))
        if length:
            ours, theirs = _padded(self.unread, sizes[0], length), _padded(other.unread, sizes[1], length)
            self.unread = mx.concatenate([ours[0], theirs[0]]), mx.concatenate([ours[1], theirs[1]])
        self.cache.join(other.cache)

    def select(self, rows: list[int]) -> "Aside":
        chosen = Aside(self.cache.select(rows))
        chosen._leave(taken(list(self.unread or ()), rows))
        return chosen

    def snapshot(self, start: int, end: int) -> Held:
        """The draft model's own, up to where it has read, and the block that it has not read."""
        rows, whole = self.cache.snapshot(start, end - self._behind())
        return Held(rows, [whole, list(self.unread or ())])

    def restore(self, held: Held, end: int) -> None:
        whole, unread = held.whole
        self._leave(unread)
        self.cache.restore(Held(held.rows, whole), end - self._behind())

    def _leave(self, unread: list[mx.array]) -> None:
        self.unread = (unread[0], unread[1]) if unread else None

    def _behind(self) -> int:
        """How many of the target's tokens it has not read; here the host waits."""
        return cast(int, self.unread[1].item()) + 1 if self.unread else 0


@dataclass(frozen=True)
class DraftModel:
    """The drafter: chains tokens of a smaller model, whose rejected ones are forgotten as the target's are."""

    model: Target
    limit: int = MAX_BLOCK - 1
    reads_prompt: bool = True

    @property
    def nbytes(self) -> int:
        return self.model.nbytes

    def kv_bytes(self, tokens: int) -> int:
        return self.model.kv_bytes(tokens)

    def reads(self, cache: Cache) -> int:
        return 0  # its buffers are its own

    def start(self, cache: Cache) -> State:
        cache.attach(Aside(self.model.make_cache()))
        return ()

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        """There is no state: what was read lies in the draft model's cache, what was not beside it."""
        aside = _aside(cache)
        if aside.unread:
            self._read(aside.cache, *aside.unread)
            aside.unread = None
        if isinstance(span.start, int):  # a prompt, or many rows at once: all of them are kept
            self.model(tokens, aside.cache, span)
            aside.cache.commit(span.length)
        elif span.length < MAX_BLOCK:
            aside.unread = tokens, count
        else:  # with one more token it would be too long for a ring
            self._read(aside.cache, tokens, count)
        return ()

    def _read(self, cache: Cache, tokens: mx.array, count: mx.array) -> None:
        self.model(tokens, cache, cache.span(tokens.shape[1]))
        cache.commit(count + 1)

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        aside, token = _aside(cache), last[:, None]
        own = aside.cache
        block, kept = _joined(aside.unread, token)  # (B, L), (B,)
        logits = self.model(block, own, own.span(block.shape[1])).logits
        logits = mx.take_along_axis(logits, kept[:, None, None], axis=1)  # of the newest token
        before = [(layer, layer.arrays()) for layer in own.layers if isinstance(layer, RecurrentCache)]
        position = own.position
        own.commit(kept + 1)
        token = pick(logits)
        for _ in range(k - 1):
            logits = self.model(token, own, own.span(1)).logits
            own.commit(1)
            token = pick(logits)
        # The newest token and the drafts come again, with the target's verdict: keys and values beyond the position
        # are covered then, recurrent states are put back.
        own.position = position
        for layer, held in before:
            layer.bind(held)
        own.commit(kept)
        aside.unread = None


def _joined(unread: tuple[mx.array, mx.array] | None, token: mx.array) -> tuple[mx.array, mx.array]:
    """The kept rows of an unread block with a token behind them, (B, L+1), and their number (B,)."""
    if unread is None:
        return token, mx.zeros((token.shape[0],), mx.int32)
    tokens, count = unread
    kept = count + 1
    rows = mx.concatenate([tokens, token], axis=1)
    return mx.where(mx.arange(rows.shape[1]) == kept[:, None], token, rows), kept


def _length(unread: tuple[mx.array, mx.array] | None) -> int:
    return unread[0].shape[1] if unread else 0


def _padded(unread: tuple[mx.array, mx.array] | None, size: int, length: int) -> tuple[mx.array, mx.array]:
    """An unread block of `length` rows; what is added is not kept, nor is anything of a block that was not there."""
    if unread is None:
        return mx.zeros((size, length), mx.int32), mx.full((size,), -1, mx.int32)
    tokens, count = unread
    return mx.pad(tokens, [(0, 0), (0, length - tokens.shape[1])]), count


def _aside(cache: Cache) -> Aside:
    layer = cache.layers[-1]
    assert isinstance(layer, Aside), f"the last layer is a {type(layer).__name__}"
    return layer
