"""The values that the stages of a round hand each other, and what a target, a drafter and a layer cache are.

Letters: B batch, L length, D width, V vocabulary, k drafted tokens, S key slots, H heads.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import mlx.core as mx

from mtp_mlx.agreement import ALONE, Agreement
from mtp_mlx.programs import Programs

if TYPE_CHECKING:
    from mtp_mlx.cache import Cache


@dataclass(frozen=True)
class Span:
    """Where a block of tokens stands in its sequence.

    While a prompt is read the start is known to the host and is a plain integer. While decoding it is
    an array on the device, so that a round can be built before the last one has been looked at.
    """

    start: int | mx.array  # int, or (B,) int32
    length: int

    def positions(self) -> mx.array:
        """Absolute position of every token of the block, (B, L) or (1, L)."""
        start = self.start if isinstance(self.start, int) else self.start[:, None]
        return mx.arange(self.length)[None] + start


Mask = mx.array | str | None  # what mx.fast.scaled_dot_product_attention takes


class Visible(Protocol):
    """The keys and values that a block may attend to, in whatever form they are stored."""

    def attend(self, queries: mx.array, scale: float, mask: Mask) -> mx.array:
        """What queries (B, heads, L, head size) find, of the same shape."""
        ...


class PlainRows(NamedTuple):
    """Keys and values as they are."""

    keys: mx.array  # (B, H, S, head size)
    values: mx.array  # (B, H, S, head size)

    def attend(self, queries: mx.array, scale: float, mask: Mask) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, *self, scale=scale, mask=mask)


class Packed(NamedTuple):
    """Quantised rows: each group of values shares a scale and an offset."""

    numbers: mx.array  # (B, H, S, head size * bits / 32) uint32
    scales: mx.array  # (B, H, S, head size / group)
    offsets: mx.array  # (B, H, S, head size / group)


class PackedRows(NamedTuple):
    """Quantised keys and values."""

    keys: Packed
    values: Packed
    group: int  # values that share a scale
    bits: int

    def attend(self, queries: mx.array, scale: float, mask: Mask) -> mx.array:
        """As `PlainRows`, without unpacking anything: for a few rows of queries, with a mask (B, 1, L, S)."""
        assert isinstance(mask, mx.array), "a prompt attends to unpacked rows"
        B, heads, L, size = queries.shape
        # All queries of a KV head are rows of one product, so that its keys are read once.
        grouped = (queries * scale).reshape(B, self.keys.numbers.shape[1], -1, size)
        scores = mx.unflatten(self._times(grouped, self.keys, transpose=True), 2, (-1, L))  # (B, H, heads / H, L, S)
        scores = mx.where(mask[:, :, None], scores, -mx.inf).flatten(2, 3)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return self._times(weights, self.values, transpose=False).reshape(B, heads, L, size)

    def _times(self, x: mx.array, rows: Packed, transpose: bool) -> mx.array:
        numbers, scales, offsets = rows
        return mx.quantized_matmul(
            x, numbers, scales, offsets, transpose=transpose, group_size=self.group, bits=self.bits
        )

    def unpacked(self) -> PlainRows:
        return PlainRows(
            *(
                mx.dequantize(numbers, scales, offsets, group_size=self.group, bits=self.bits)
                for numbers, scales, offsets in (self.keys, self.values)
            )
        )


class Held(NamedTuple):
    """A copy of what a layer holds of a text, or a list of such for several layers: nothing in it is written again."""

    rows: list[Any]  # of each token by itself, arrays (B, H, tokens, *) or lists of them: they can be cut and joined
    whole: list[Any]  # of the text as a whole, which is right at its end and nowhere else


class LayerCache(Protocol):
    """What one layer remembers of a sequence: keys and values, or a recurrent state."""

    def reserve(self, rows: int) -> None:
        """Make room for positions 0 .. rows-1; called by the host between rounds."""
        ...

    def commit(self, count: mx.array | int) -> None:
        """Keep the first `count` rows of the block last written, (B,) or the same number for all."""
        ...

    def arrays(self) -> list[Any]:
        """Everything that it holds on the device: arrays, or lists of them."""
        ...

    def bind(self, arrays: list[Any]) -> None:
        """Hold these in their place: what a traced step has made of them."""
        ...

    def join(self, other: "LayerCache", sizes: tuple[int, int]) -> None:
        """Hold what another layer of its kind and capacity holds behind its own; they are of so many sequences."""
        ...

    def select(self, rows: list[int]) -> "LayerCache":
        """A layer that holds copies of what this one holds of some of its sequences."""
        ...

    def snapshot(self, start: int, end: int) -> Held:
        """What it holds of the first `end` tokens, which are all that are kept; of rows those from `start` on.

        Rows of the last 32 tokens (MAX_BLOCK) may still be written as the text goes on, those before them never.
        """
        ...

    def restore(self, held: Held, end: int) -> None:
        """Hold what `snapshot(0, end)` gave, in buffers of its own, for which there is room."""
        ...


class Output(NamedTuple):
    """One forward pass over a block."""

    logits: mx.array  # (B, L, V), lazy: rows nobody reads are never computed
    hidden: mx.array  # (B, L, D) after the final norm


class Draft(NamedTuple):
    """What a drafter proposes."""

    tokens: mx.array  # (B, k) int32
    logprobs: mx.array | None = None  # (B, k, V) float32, what each was drawn from; None where nothing was drawn


@dataclass(frozen=True)
class Kept:
    """What the target made of a draft: `count` drafts are right, then comes one token of its own."""

    count: mx.array  # (B,) int32, 0..k
    tokens: mx.array  # (B, k+1) int32; row b holds count[b]+1 valid tokens


State = tuple[mx.array, ...]  # what a drafter knows of one sequence; empty where it knows nothing yet


class Pick(Protocol):
    """Chooses one drafted token after the other from a drafter's logits."""

    def __call__(self, logits: mx.array, ids: mx.array | None = None) -> mx.array:
        """(B, 1, C) logits -> token (B, 1). `ids` (B, 1, C) names the columns where they are not the vocabulary."""
        ...


class Target(Protocol):
    """A language model that verifies. Holds weights only."""

    context: int  # the longest sequence the model was made for, in tokens
    vocabulary: int  # number of token ids

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        ...

    def make_cache(self, kv_bits: int | None = None) -> "Cache":
        """An empty cache for one sequence; `kv_bits` quantises the keys and values of its full-attention layers.

        Raises ValueError where these cannot be quantised.
        """
        ...

    def kv_bytes(self, tokens: int, kv_bits: int | None = None) -> int:
        """Bytes that such a cache holds for a text of so many tokens."""
        ...

    def embed(self, tokens: mx.array) -> mx.array:
        """Token embeddings as the first layer receives them, (B, L) -> (B, L, D)."""
        ...

    def __call__(self, tokens: mx.array, cache: "Cache", span: Span) -> Output:
        """Logits and hidden of a block (B, L); its keys and values are written, not yet committed."""
        ...


class Drafter(Protocol):
    """Proposes tokens. Holds weights; what belongs to one sequence lives in its state."""

    @property
    def limit(self) -> int:
        """The most tokens it can draft at once."""
        ...

    @property
    def reads_prompt(self) -> bool:
        """Whether it must be told of every chunk of a prompt, or learns enough from the first round.

        What it is told of has to be computed: telling it of hiddens it does not need makes layers run over a
        whole prompt that otherwise nothing would ask for (those that share another layer's keys).
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        ...

    def kv_bytes(self, tokens: int) -> int:
        """Bytes that its own layers add to the cache of a text of so many tokens."""
        ...

    def reads(self, cache: "Cache") -> int:
        """Bytes of those buffers of the target that a draft reads in place."""
        ...

    def start(self, cache: "Cache") -> State:
        """The state of a sequence of which nothing has been read yet.

        A drafter with keys and values of its own attaches their layer to the target's cache.
        """
        ...

    def advance(
        self, state: State, cache: "Cache", tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        """Learn that tokens[:, : count+1] of the block at `span` are now in the target's cache, with these hiddens."""
        ...

    def draft(self, state: State, cache: "Cache", last: mx.array, k: int, pick: Pick) -> None:
        """Propose what follows `last` (B,), the one token that is not yet in the target's cache: `pick` k tokens."""
        ...


@dataclass(frozen=True)
class Pair:
    """A target and the drafter that proposes for it."""

    target: Target
    drafter: Drafter
    programs: Programs = field(default_factory=Programs, compare=False, repr=False)  # shared by all sequences
    kv_bits: int | None = None  # of the keys and values in full-attention layers; None keeps them as computed
    measured: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what outlives a text
    agreed: Agreement = ALONE  # what has to be decided as one where several machines run the pair

    def make_cache(self) -> "Cache":
        """An empty cache for one sequence."""
        return self.target.make_cache(self.kv_bits)
