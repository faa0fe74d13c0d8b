"""What a sequence leaves in memory: buffers of fixed capacity with the position on the device, and recurrent states.

A rejected draft is never removed from a buffer: it lies beyond the position, where no mask lets anybody see it,
and the next block overwrites it. So `commit` is one addition there, and shapes stay the same from round to round.
A recurrent state has swallowed the draft; it is made again from the state before the block.
"""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mtp_mlx.types import Held, LayerCache, Mask, Packed, PackedRows, PlainRows, Span, Visible

MAX_BLOCK = 32  # rows of the largest block that may be written while decoding: the slack of a ring
SMALLEST = 256  # rows of the smallest bucket
GROUPS = (64, 32)  # numbers that share a scale where they are quantised, the preferred first


def bucket(rows: int) -> int:
    """Capacity for `rows` rows: eight sizes between two powers of two, so that at most an eighth stays empty
    (or, in a short sequence, 255 rows).

    >>> bucket(10), bucket(257), bucket(5000)
    (256, 512, 5120)
    """
    step = max(SMALLEST, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step


class Cache:
    """What a target remembers of one sequence: its layers' buffers and how many tokens are kept."""

    def __init__(self, layers: list[LayerCache], batch: int = 1):
        self.layers = layers
        self.position = mx.zeros((batch,), mx.int32)  # (B,) tokens kept
        self.capacity = 0

    def reserve(self, rows: int) -> None:
        """Make room for positions 0 .. rows-1 in every layer."""
        if rows > self.capacity:
            self.capacity = bucket(rows)
            for layer in self.layers:
                layer.reserve(self.capacity)
                mx.eval(layer.arrays())  # so that no more than one layer is in memory twice

    def attach(self, layer: LayerCache) -> None:
        """Add a layer that is not the target's own: what a drafter remembers of the same tokens."""
        layer.reserve(self.capacity)
        self.layers.append(layer)

    def attention(self, i: int) -> "KeyValueCache":
        """Layer i, which has keys and values."""
        layer = self.layers[i]
        assert isinstance(layer, KeyValueCache), f"layer {i} is a {type(layer).__name__}"
        return layer

    def recurrent(self, i: int) -> "RecurrentCache":
        """Layer i, which has a recurrent state."""
        layer = self.layers[i]
        assert isinstance(layer, RecurrentCache), f"layer {i} is a {type(layer).__name__}"
        return layer

    def span(self, length: int) -> Span:
        """The block of `length` tokens that comes next."""
        return Span(self.position, length)

    def commit(self, count: mx.array | int) -> None:
        """Keep the first `count` rows of the block last written, (B,) or the same number for all.

        The others are as good as gone. A host that knows the number should give it as an integer: where it is
        all rows, nothing has to be done again.
        """
        self.position = self.position + count
        for layer in self.layers:
            layer.commit(count)

    def arrays(self) -> list[list[Any]]:
        """Everything that is held on the device, layer by layer, the position first."""
        return [[self.position], *(layer.arrays() for layer in self.layers)]

    def bind(self, arrays: list[list[Any]]) -> None:
        """Hold these in their place: what a traced step has made of them."""
        (self.position,), *layers = arrays
        for layer, held in zip(self.layers, layers, strict=True):
            layer.bind(held)

    def snapshot(self, start: int, end: int) -> Held:
        """A copy of what the layers hold of the first `end` tokens, all that are kept; of rows those from `start` on.

        Lists with one entry for each layer, lazily computed.
        """
        held = [layer.snapshot(start, end) for layer in self.layers]
        return Held([rows for rows, _ in held], [whole for _, whole in held])

    def restore(self, held: Held, end: int) -> None:
        """Go on from what `snapshot(0, end)` gave; there is room for it, and nothing has been written yet."""
        self.position = mx.full(self.position.shape, end, mx.int32)
        for layer, rows, whole in zip(self.layers, *held, strict=True):
            layer.restore(Held(rows, whole), end)

    def join(self, other: "Cache") -> None:
        """Hold another cache's sequences behind its own; the other one is used up.

        Neither has a block that waits for its commit, and both have the same layers.
        """
        self.reserve(other.capacity)
        other.reserve(self.capacity)
        sizes = self.position.size, other.position.size
        self.position = mx.concatenate([self.position, other.position])
        for layer in self.layers:
            layer.join(other.layers.pop(0), sizes)
            mx.eval(layer.arrays())  # so that no more than one layer is in memory twice

    def select(self, rows: list[int]) -> "Cache":
        """A cache of its own for these of its sequences; nothing waits for its commit."""
        chosen = copy(self)
        chosen.position = self.position[mx.array(rows)]
        chosen.layers = []
        for layer in self.layers:
            chosen.layers.append(layer.select(rows))
            mx.eval(chosen.layers[-1].arrays())
        return chosen

    def reduce(self, rows: list[int]) -> None:
        """Hold nothing but these of its sequences; nothing waits for its commit."""
        self.position = self.position[mx.array(rows)]
        for number, layer in enumerate(self.layers):
            self.layers[number] = layer.select(rows)
            mx.eval(self.layers[number].arrays())  # so that no more than one layer is in memory twice

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers, empty capacity included."""
        held = dict[str, mx.array](tree_flatten(self.arrays()))
        return sum(array.nbytes for array in held.values())


@dataclass
class _Buffers:
    """What one layer stores of every token, a buffer (B, H, S, *) for each part of a row: its key, its value, or
    what these are packed into. The dtypes are those of the first rows written."""

    capacity: int
    held: list[mx.array] = field(default_factory=list)

    def grow(self, capacity: int) -> None:
        """Enlarge at once: a drafter reads the buffers, with masks of the new size, before the next write."""
        self.capacity = capacity
        self.held = [_enlarged(buffer, capacity) for buffer in self.held]

    def room_for(self, rows: list[mx.array]) -> list[mx.array]:
        """The buffers, allocated to fit rows like these if there are none yet."""
        self.held = self.held or [_empty(part, self.capacity) for part in rows]
        return self.held

    def put(self, rows: list[mx.array], slots: slice | mx.array) -> list[mx.array]:
        """Put rows into slots that the host knows."""
        for buffer, part in zip(self.room_for(rows), rows, strict=True):
            buffer[:, :, slots] = part
        return self.held

    def scatter(self, rows: list[mx.array], slots: mx.array) -> list[mx.array]:
        """Put rows (B, H, L, *) into slots (B, L) that only the device knows."""
        index = slots[:, None, :, None]
        pairs = zip(self.room_for(rows), rows, strict=True)
        self.held = [mx.put_along_axis(held, mx.broadcast_to(index, part.shape), part, axis=2) for held, part in pairs]
        return self.held

    def copied(self, slots: mx.array) -> list[mx.array]:
        """The rows in these slots. Never a slice: that can be a view, which would make the next write copy it all."""
        return [mx.take(buffer, slots, axis=2) for buffer in self.held]

    def stored(self) -> list[mx.array]:
        assert self.held, "nothing has been written yet"
        return self.held


def _empty(rows: mx.array, capacity: int) -> mx.array:
    """A buffer of `capacity` slots for rows like these."""
    batch, heads, _, size = rows.shape
    return mx.zeros((batch, heads, capacity, size), rows.dtype)


def _enlarged(buffer: mx.array, capacity: int) -> mx.array:
    return mx.concatenate([buffer, _empty(buffer, capacity - buffer.shape[2])], axis=2)


class KeyValueCache(ABC):
    """The keys and values of one attention layer, and who may see them."""

    def __init__(self, capacity: int) -> None:
        self._buffers = _Buffers(capacity)

    @abstractmethod
    def reserve(self, rows: int) -> None:
        """Make room for positions 0 .. rows-1; called by the host between rounds."""

    @abstractmethod
    def write(self, keys: mx.array, values: mx.array, span: Span) -> Visible:
        """Store a block's rows, (B, H, L, head size), and return all that the block may look at."""

    @abstractmethod
    def mask(self, span: Span) -> Mask:
        """Which of the rows that `write` (or `stored`) returns each token of the block may see."""

    def commit(self, count: mx.array | int) -> None:  # noqa: B027
        """Nothing to do: what is not kept lies beyond the position."""

    def stored(self) -> Visible:
        """The buffers themselves, never a copy: what a drafter that shares the target's cache reads."""
        return self._visible(self._buffers.stored())

    def _visible(self, buffers: list[mx.array]) -> Visible:
        return PlainRows(*buffers)

    def arrays(self) -> list[mx.array]:
        return self._buffers.held

    def bind(self, arrays: list[mx.array]) -> None:
        self._buffers.held = arrays

    def join(self, other: LayerCache, sizes: tuple[int, int]) -> None:
        self.bind(stacked(self.arrays(), other.arrays(), sizes))

    def select(self, rows: list[int]) -> Self:
        chosen = copy(self)
        chosen._buffers = replace(self._buffers, held=taken(self.arrays(), rows))
        return chosen

    @abstractmethod
    def snapshot(self, start: int, end: int) -> Held:
        """A copy of what is held of the first `end` tokens; of rows those from `start` on."""

    @abstractmethod
    def restore(self, held: Held, end: int) -> None:
        """Hold what `snapshot(0, end)` gave."""


class FullCache(KeyValueCache):
    """Every token's keys and values: slot = position."""

    def __init__(self) -> None:
        super().__init__(SMALLEST)

    def reserve(self, rows: int) -> None:
        if rows > self._buffers.capacity:
            self._buffers.grow(rows)

    def write(self, keys: mx.array, values: mx.array, span: Span) -> Visible:
        rows = self._rows(keys, values)
        if isinstance(span.start, int):
            # Reading a prompt: the host knows where it is and need not attend over empty slots.
            end = span.start + span.length
            held = self._buffers.put(rows, slice(span.start, end))
            return self._of_prompt([buffer[:, :, :end] for buffer in held])
        return self._visible(self._buffers.scatter(rows, span.positions()))

    def _rows(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """What is stored of a block's rows."""
        return [keys, values]

    def _of_prompt(self, buffers: list[mx.array]) -> Visible:
        """What a chunk of a prompt looks at."""
        return self._visible(buffers)

    def mask(self, span: Span) -> Mask:
        if isinstance(span.start, int):
            return "causal"
        slots = mx.arange(self._buffers.capacity)
        return (slots <= span.positions()[..., None])[:, None]  # (B, 1, L, S)

    def snapshot(self, start: int, end: int) -> Held:
        return Held(self._buffers.copied(mx.arange(start, end)), [])

    def restore(self, held: Held, end: int) -> None:
        self._buffers.put(held.rows, slice(0, end))


class QuantisedCache(FullCache):
    """The same with keys and values of `bits` bits, in groups that share a scale and an offset.

    Whoever reads a row reads what was stored, the token itself and the drafter included, so that a block sees exactly
    what its tokens one by one would see.
    """

    def __init__(self, bits: int, group: int) -> None:
        super().__init__()
        self.bits = bits
        self.group = group

    def _rows(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        return [part for rows in (keys, values) for part in mx.quantize(rows, self.group, self.bits)]

    def _visible(self, buffers: list[mx.array]) -> PackedRows:
        return PackedRows(Packed(*buffers[:3]), Packed(*buffers[3:]), self.group, self.bits)

    def _of_prompt(self, buffers: list[mx.array]) -> Visible:
        """Unpacked, one layer after the other: the scores of a long chunk are never in memory as a whole then."""
        return self._visible(buffers).unpacked()


def full_cache(size: int, kv_bits: int | None) -> FullCache:
    """For a full-attention layer with heads of `size`. Raises ValueError for heads that cannot be quantised."""
    if kv_bits is None:
        return FullCache()
    return QuantisedCache(kv_bits, kv_group(size))


def kv_group(size: int) -> int:
    """How many values of a head of `size` share a scale. Raises ValueError for a head that cannot be quantised."""
    group = next((group for group in GROUPS if size % group == 0), None)
    if group is None:
        raise ValueError(f"a head of {size} values cannot be quantised, only multiples of {GROUPS[-1]}")
    return group


class SlidingCache(KeyValueCache):
    """The last `window` tokens' keys and values, in a ring: slot = position mod size.

    A query at position q sees the positions q - window < p <= q. The ring is longer than the window by the
    largest block, so that the rejected rows of a block never lie on a slot that is still inside the window.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.size = window + MAX_BLOCK
        super().__init__(self.size)

    def reserve(self, rows: int) -> None:
        """A ring has its final size from the start."""

    def write(self, keys: mx.array, values: mx.array, span: Span) -> Visible:
        if isinstance(span.start, int):
            return self._write_prompt(keys, values, span.start)
        assert span.length <= MAX_BLOCK, f"a block of {span.length} rows in a ring with {MAX_BLOCK} to spare"
        return self._visible(self._buffers.scatter([keys, values], span.positions() % self.size))

    def _write_prompt(self, keys: mx.array, values: mx.array, start: int) -> Visible:
        """A chunk of a prompt sees the window before it and itself, both in the order of time."""
        length = keys.shape[2]
        old = self._slots(start - self._before(start), start)
        rows = [keys, values]
        pairs = zip(self._buffers.room_for(rows), rows, strict=True)
        seen = [mx.concatenate([mx.take(held, old, axis=2), part], axis=2) for held, part in pairs]
        kept = min(length, self.size)
        slots = self._slots(start + length - kept, start + length)
        self._buffers.put([part[:, :, length - kept :] for part in rows], slots)
        return PlainRows(*seen)

    def mask(self, span: Span) -> Mask:
        if isinstance(span.start, int):
            return self._prompt_mask(span.start, span.length)
        query = span.positions()[..., None]  # (B, L, 1)
        # How long before the query a slot was written. A slot that was written after it, by this block or
        # by a rejected draft, comes out as at least size - MAX_BLOCK = window, hence invisible.
        age = (query - mx.arange(self.size)) % self.size  # (B, L, S)
        return (age < mx.minimum(query + 1, self.window))[:, None]  # (B, 1, L, S)

    def _prompt_mask(self, start: int, length: int) -> Mask:
        before = self._before(start)
        if before + length <= self.window:
            return "causal"
        query = mx.arange(before, before + length)[:, None]
        key = mx.arange(before + length)
        return (key <= query) & (key > query - self.window)

    def snapshot(self, start: int, end: int) -> Held:
        """The window in the order of time: all that the token at `end`, or a drafter one before it, can see."""
        return Held([], self._buffers.copied(self._slots(max(0, end - self.window), end)))

    def restore(self, held: Held, end: int) -> None:
        self._buffers.put(held.whole, self._slots(max(0, end - self.window), end))

    def _before(self, start: int) -> int:
        """How many rows before `start` the first token of a chunk may still see."""
        return min(start, self.window - 1)

    def _slots(self, start: int, end: int) -> mx.array:
        return mx.arange(start, end) % self.size


class _Recurrence(NamedTuple):
    """What a block put into a recurrent layer, so that its first rows can be put in again without the others."""

    rows: mx.array  # (B, kernel-1 + L, C) input of the convolution, the rows before the block included
    keys: mx.array  # (B, L, Hk, Dk)
    values: mx.array  # (B, L, Hv, Dv)
    decay: mx.array  # (B, L, Hv)
    beta: mx.array  # (B, L, Hv)
    after: mx.array  # (B, Hv, Dv, Dk) the state with every row in it


class RecurrentCache:
    """State of a gated delta rule layer (Yang et al. 2024, arXiv 2412.06464) and of the convolution before it.

    A block leaves the state before it alone. `commit` then takes the state after the block if all rows are kept;
    otherwise it runs the recurrence once more over the kept rows, from the inputs the block left here: one kernel,
    no projection. State and decay are float32.
    """

    def __init__(self, kernel: int) -> None:
        self.kernel = kernel
        self._reach = kernel - 1  # rows before a token that its convolution sees
        self._tail: mx.array | None = None  # (B, kernel-1, C)
        self._state: mx.array | None = None  # (B, Hv, Dv, Dk)
        self._rows: mx.array | None = None  # (B, kernel-1 + L, C)
        self._block: _Recurrence | None = None

    def reserve(self, rows: int) -> None:
        """The state has its final size from the start."""

    def extend(self, rows: mx.array) -> mx.array:
        """A block's rows (B, L, C) behind those that its convolution also sees, (B, kernel-1 + L, C)."""
        if self._tail is None:
            self._tail = mx.zeros((rows.shape[0], self._reach, rows.shape[2]), rows.dtype)
        self._rows = mx.concatenate([self._tail, rows], axis=1)
        return self._rows

    def recur(self, queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array) -> mx.array:
        """What the queries (B, L, Hk, Dk) read out row by row, (B, L, Hv, Dv).

        Each row decays the state, corrects what `keys` (B, L, Hk, Dk) retrieve towards `values` (B, L, Hv, Dv)
        by the share `beta` (B, L, Hv), then reads.
        """
        if self._state is None:
            B, _, Hv, Dv = values.shape
            self._state = mx.zeros((B, Hv, Dv, keys.shape[-1]), mx.float32)
        read, after = _gated_delta(queries, keys, values, decay, beta, self._state)
        assert self._rows is not None, "the block's convolution comes first"
        self._block = _Recurrence(self._rows, keys, values, decay, beta, after)
        return read.astype(values.dtype)

    def commit(self, count: mx.array | int) -> None:
        assert self._block is not None, "nothing has been written since the last commit"
        rows, keys, values, decay, beta, after = self._block
        length = keys.shape[1]
        kept = mx.array(count).reshape(-1, 1)  # (B, 1) or (1, 1)
        if isinstance(count, int) and count == length:
            self._state = after
        else:
            lost = (mx.arange(length) >= kept)[..., None]  # (B, L, 1)
            # A row without decay and without a correction leaves the state as it is, to the bit. Its key and value
            # are blanked too: one that is not finite would not vanish in a product with 0.
            decay, beta = mx.where(lost, 1.0, decay), mx.where(lost, 0.0, beta)
            keys, values = mx.where(lost[..., None], 0.0, keys), mx.where(lost[..., None], 0.0, values)
            _, self._state = _gated_delta(keys, keys, values, decay, beta, self._state)
        # A copy: a slice would keep the rows of a whole prompt chunk alive.
        self._tail = mx.take_along_axis(rows, (kept + mx.arange(self._reach))[..., None], axis=1)
        self._rows = self._block = None

    def arrays(self) -> list[mx.array]:
        held = [self._tail, self._state, *(self._block or ())]
        return [array for array in held if array is not None]

    def bind(self, arrays: list[mx.array]) -> None:
        self._tail, self._state, *block = arrays or (None, None)
        self._block = _Recurrence(*block) if block else None

    def join(self, other: LayerCache, sizes: tuple[int, int]) -> None:
        self.bind(stacked(self.arrays(), other.arrays(), sizes))

    def select(self, rows: list[int]) -> "RecurrentCache":
        chosen = copy(self)
        chosen.bind(taken(self.arrays(), rows))
        return chosen

    def snapshot(self, start: int, end: int) -> Held:
        """Tail and state themselves: they are replaced and never written, so nobody needs a copy."""
        return Held([], self.arrays()[:2])

    def restore(self, held: Held, end: int) -> None:
        self.bind(held.whole)


def stacked(ours: list[mx.array], theirs: list[mx.array], sizes: tuple[int, int]) -> list[mx.array]:
    """Arrays of two batches of such sizes in one piece each; who holds nothing yet gets zeros, which nobody sees."""
    ours = ours or [_blank(array, sizes[0]) for array in theirs]
    theirs = theirs or [_blank(array, sizes[1]) for array in ours]
    return [mx.concatenate([one, other]) for one, other in zip(ours, theirs, strict=True)]


def taken(arrays: list[mx.array], rows: list[int]) -> list[mx.array]:
    """Copies of some rows of arrays (B, *). Never a slice: that can be a view, which would keep all of it alive."""
    return [mx.take(array, mx.array(rows), axis=0) for array in arrays]


def _blank(array: mx.array, size: int) -> mx.array:
    return mx.zeros((size, *array.shape[1:]), array.dtype)


def _gated_delta(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None
) -> list[mx.array]:
    """What is read, and the state afterwards; float32 throughout.

    Given bfloat16 rows, MLX rounds the decay to bfloat16 as well: 0.999 becomes 1, and a memory that should fade
    stays. bench/recurrence.py measures it.
    """
    update: Any = mx.fast.gated_delta_update  # MLX's stub leaves its arrays out
    rows = [array.astype(mx.float32) for array in (queries, keys, values, decay, beta)]
    return cast(list[mx.array], update(*rows, state))
