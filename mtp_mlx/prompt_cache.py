"""mlx-lm's prompt caches: a sequence goes on from what they hold, and what it has read is left in them.

Contents are copied at the beginning and at the end of a text; in between the caches stay as they were. What tokens
they were made from nobody knows. What Qwen's head has read stands behind the layers of the target, as two more caches
of mlx-lm's: its own models pass over them, and saving, loading and copying keep them.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache

from mtp_mlx.admission import Claims
from mtp_mlx.cache import FullCache, QuantisedCache, RecurrentCache, SlidingCache
from mtp_mlx.choosing import Callables, Rules
from mtp_mlx.draft_model import Aside
from mtp_mlx.errors import RequestError
from mtp_mlx.sequence import Sequence
from mtp_mlx.snapshots import Part, Snapshot, blank, restore, take
from mtp_mlx.stock import empty
from mtp_mlx.types import Held, LayerCache, Pair, Target

Response = TypeVar("Response")

UNKNOWN = -1  # in place of a token's id
HOW_TO_MAKE = "make it with mlx_lm.models.cache.make_prompt_cache(model) for this model"

_log = logging.getLogger(__name__)


def stock_caches(target: Target) -> list[Any]:
    """Empty caches as mlx-lm's own model of the same weights makes them."""
    return _stock(target.make_cache().layers)


def _stock(layers: Iterable[LayerCache]) -> list[Any]:
    return [cache for layer in layers for cache in empty(_inner(layer))]


class PromptCache:
    """A list of mlx-lm's caches, for one text: what it goes on from, and what it leaves.

    After N tokens that somebody has been given, the caches hold what they held, the prompt and the N tokens, whatever
    ended the text. They stay as they were where it was broken off among others of a batch, in the middle of a round.

    `beside` are the texts that are read or written at the same time, with caches of their own: what they have been
    promised is left to them. Raises RequestError for caches that do not belong to such a pair.
    """

    evictable = 0

    def __init__(self, pair: Pair, caches: list[Any], beside: "list[Text] | None" = None):
        self.pair, self.caches = pair, caches
        self.texts: list[Text] = [] if beside is None else beside
        self.given = 0  # tokens of the text that somebody has
        self.given_of_round = 0  # of them, those of a round of which there are more
        _check_kinds(pair, caches)
        self.offset = _offset(self._own)  # tokens that they hold

    @property
    def claims(self) -> Claims:
        """Of the texts that are being read or written."""
        return Claims.of((text.sequence.nbytes, text.promised) for text in self.texts)

    @property
    def _own(self) -> list[Any]:
        """Those of the target."""
        return self.caches[: len(self.pair.make_cache().layers)]

    @property
    def bits(self) -> int | None:
        """How many bits the keys and values in them have, if they are quantised."""
        return next((int(cache.bits) for cache in self._own if type(cache) is QuantizedKVCache), None)

    def release(self, nbytes: int) -> None:
        """Nothing here may be evicted."""

    def open(self, prompt: list[int], chooser: Rules | Callables, seed: int = 0, promised: int = 0) -> "Text":
        """A text that goes on from the caches with a prompt of at least one token."""
        if not self.offset:
            return Text(self, Sequence(self.pair, chooser, seed), prompt, promised)
        room = self.offset + len(prompt)
        sequence = restore(self.pair, chooser, _snapshot(self.pair, self.caches, self.offset), prompt[0], seed, room)
        return Text(self, sequence, prompt, promised)

    def hand_out(self, responses: list[Response]) -> Iterator[Response]:
        """The responses of one round; who stops asking has not been given the others."""
        for number, response in enumerate(responses, 1):
            self.given, self.given_of_round = self.given + 1, number
            yield response
        self.given_of_round = 0

    def store(self, sequence: Sequence) -> None:
        """Put in what a sequence has read."""
        if sequence.length > 0:
            _store(self.pair, self.caches, take(sequence))


class Text:
    """A text that goes on from caches: `with prompt_cache.open(...) as text`. They are written when it ends."""

    cached = 0  # tokens of the prompt that need not be read

    def __init__(self, cache: PromptCache, sequence: Sequence, prompt: list[int], promised: int):
        self.sequence, self._cache, self._prompt = sequence, cache, prompt
        self.promised = promised  # bytes that its sequence may take
        cache.texts.append(self)

    def read(self, step: int, marks: Iterable[int] = ()) -> Iterator[int]:
        """Read the prompt up to its last token, `step` tokens at a time; how many are read, after each chunk."""
        known = len(self.sequence.text) - self._cache.offset  # the first token, if the text goes on from something
        for read in self.sequence.chunks(self._prompt[known:], step):
            if read:
                yield self.sequence.length - self._cache.offset

    def _settle(self) -> bool:
        """Let the sequence have read all that somebody has been given, and nothing else; whether it can."""
        beyond = len(self.sequence.text) - self._cache.offset - len(self._prompt) - self._cache.given
        if beyond > 0 and self.sequence.committed:
            return False
        if beyond > 0:  # of the newest round: the token after the last one given stays, as the one that is not read
            self.sequence.keep(self._cache.given_of_round + 1)
        elif beyond == 0:
            for _ in self.sequence.chunks([UNKNOWN], 1):
                pass
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._settle():
                self._cache.store(self.sequence)
        finally:
            self._cache.texts.remove(self)


def _check_kinds(pair: Pair, caches: list[Any]) -> None:
    """Raises RequestError where a list does not consist of the caches that a pair's layers need."""
    if not isinstance(caches, list):
        raise RequestError(f"the prompt cache is a {type(caches).__name__}; give a list, which can be added to")
    wanted, extra = stock_caches(pair.target), _extra(pair)
    # What stands behind may be of a drafter that is not here: it is left alone, and found to be too short later.
    if len(caches) < len(wanted) or (extra and len(caches) not in (len(wanted), len(wanted) + len(extra))):
        raise RequestError(
            f"the prompt cache has {len(caches)} entries, this model's has {len(wanted)}"
            + (f", or {len(wanted) + len(extra)} with its drafter's" if extra else "")
            + f"; {HOW_TO_MAKE}"
        )
    for number, (cache, stock) in enumerate(zip(caches, wanted + extra, strict=False)):
        _check_kind(number, cache, stock)


def _check_kind(number: int, cache: Any, stock: Any) -> None:
    """Raises RequestError where one cache is not of the kind that stands in its place."""
    kind, given = type(stock).__name__, type(cache).__name__
    quantised = type(stock) is KVCache and type(cache) is QuantizedKVCache
    if type(cache) is not type(stock) and not quantised:
        advice = "give the caches of one text, not of a batch" if given.startswith("Batch") else HOW_TO_MAKE
        raise RequestError(f"entry {number} of the prompt cache is a {given}, expected a {kind}; {advice}")
    if type(cache) is RotatingKVCache and (cache.max_size, cache.keep) != (stock.max_size, stock.keep):
        raise RequestError(
            f"entry {number} of the prompt cache keeps the first {cache.keep} of {cache.max_size} tokens, this model's "
            f"the first {stock.keep} of {stock.max_size}; {HOW_TO_MAKE}"
        )
    if type(cache) is ArraysCache and (cache.lengths is not None or cache.left_padding is not None):
        raise RequestError(f"entry {number} of the prompt cache is of a batch; give the caches of one text")


def _offset(caches: list[Any]) -> int:
    """How many tokens the target's caches hold."""
    offsets = {int(cache.offset) for cache in caches if type(cache) is not ArraysCache}
    if len(offsets) > 1:
        raise RequestError(f"the layers of the prompt cache hold different numbers of tokens: {sorted(offsets)}")
    offset = offsets.pop()
    for number, cache in enumerate(caches):
        if type(cache) is ArraysCache and cache.empty() != (offset == 0):
            held = "nothing" if cache.empty() else "a state"
            raise RequestError(f"the prompt cache holds {offset} tokens, but its entry {number} {held}; {HOW_TO_MAKE}")
    return offset


# --------------------------------------------------------------------------- layers of both kinds


def _inner(layer: LayerCache) -> list[LayerCache]:
    """The layers that mlx-lm has a cache for each: a draft model's own, or this one."""
    return layer.cache.layers if isinstance(layer, Aside) else [layer]


def _attached(pair: Pair) -> list[LayerCache]:
    """The layers of a drafter's own."""
    cache = pair.make_cache()
    known = len(cache.layers)
    pair.drafter.start(cache)
    return cache.layers[known:]


def _extra(pair: Pair) -> list[Any]:
    """Empty caches for what a drafter has read: its layers, and behind a head's the hidden that waits for its partner.

    A drafter that does not read prompts has nothing to keep.
    """
    layers = _attached(pair)
    headed = any(not isinstance(layer, Aside) for layer in layers)
    return _stock(layers) + [ArraysCache(size=1)] * headed


# --------------------------------------------------------------------------- from mlx-lm's caches


def _snapshot(pair: Pair, caches: list[Any], offset: int) -> Snapshot:
    """What the caches hold, as a snapshot of a text of unknown tokens."""
    own, attached, like = pair.make_cache().layers, _attached(pair), blank(pair, offset)
    extra = caches[len(own) :]
    known = bool(attached) and _are_at(extra, offset)
    if attached and not known:
        _log.warning(
            "this prompt cache does not hold what the drafter has read of its %d tokens, so fewer drafts will be right",
            offset,
        )
    supply = iter(caches)
    held = [_joined(layer, [_held(inner, next(supply), offset) for inner in _inner(layer)]) for layer in own]
    for layer in attached:
        parts = [_held(inner, next(supply), offset) if known else Held([], []) for inner in _inner(layer)]
        held.append(_joined(layer, parts))
    for number in range(len(own) + known * len(attached)):
        held[number] = _fitted(held[number], Held(like.parts[0].rows[number], like.whole[number]), number)
    state = tuple(extra[-1].cache) if known and like.state else ()
    rows, whole = [layer.rows for layer in held], [layer.whole for layer in held]
    return Snapshot([UNKNOWN] * offset, (Part(0, rows),), whole, state, ready=known)


def _are_at(extra: list[Any], offset: int) -> bool:
    """Whether a drafter's caches hold as many tokens as the target's; they do not grow where mlx-lm reads."""
    offsets = {int(cache.offset) for cache in extra if type(cache) is not ArraysCache}
    return offsets == {offset} and not any(cache.empty() for cache in extra)


def _held(layer: LayerCache, cache: Any, end: int) -> Held:
    """What a cache of mlx-lm's holds, in the form of a layer of ours."""
    match layer, type(cache).__name__:
        case RecurrentCache(), "ArraysCache":
            return Held([], list(cache.cache))
        case SlidingCache(), "RotatingKVCache":
            window = min(end, layer.window)
            return Held([], [_in_order(rows, cache)[:, :, -window:] for rows in (cache.keys, cache.values)])
        case QuantisedCache(), "QuantizedKVCache":
            return Held([part[:, :, :end] for part in (*cache.keys, *cache.values)], [])
        case QuantisedCache(), "KVCache":
            rows = [rows[:, :, :end] for rows in (cache.keys, cache.values)]
            return Held([part for half in rows for part in mx.quantize(half, layer.group, layer.bits)], [])
        case FullCache(), "KVCache":
            return Held([rows[:, :, :end] for rows in (cache.keys, cache.values)], [])
    raise RequestError(
        f"the prompt cache holds quantised keys and values, and so does not every layer of this model's: {HOW_TO_MAKE}"
    )


def _in_order(rows: mx.array, cache: Any) -> mx.array:
    """The rows of a ring, the oldest first; before them, in one that is not full yet, those that are not in use."""
    newest = cache._idx
    return mx.concatenate([rows[:, :, newest:], rows[:, :, :newest]], axis=2)


def _joined(layer: LayerCache, parts: list[Held]) -> Held:
    """What a layer holds, of what is held for each of its `_inner` ones."""
    if isinstance(layer, Aside):
        return Held([part.rows for part in parts], [[part.whole for part in parts], []])
    (held,) = parts
    return held


def _fitted(held: Held, like: Held, number: int) -> Held:
    """The same in the precision that the model computes with. Raises RequestError for other shapes."""
    given, wanted = _shapes(held), _shapes(like)
    if given != wanted:
        raise RequestError(
            f"layer {number} of the prompt cache holds arrays of shapes {[*given.values()]}, this model's are "
            f"{[*wanted.values()]}: it was made with another model, or for a batch"
        )
    rows, whole = tree_map(lambda array, other: array.astype(other.dtype), list(held), list(like))
    return Held(rows, whole)


def _shapes(held: Held) -> dict[str, tuple[int, ...]]:
    arrays: dict[str, mx.array] = dict(tree_flatten(list(held)))
    return {name: array.shape for name, array in arrays.items()}


# --------------------------------------------------------------------------- into mlx-lm's caches


def _store(pair: Pair, caches: list[Any], snapshot: Snapshot) -> None:
    """Let the caches hold a snapshot."""
    own, attached = pair.make_cache().layers, _attached(pair)
    held = [Held(rows, whole) for rows, whole in zip(*snapshot.held(), strict=True)]
    for number, (layer, part) in enumerate(zip(own, held, strict=False)):
        caches[number] = _filled(layer, caches[number], part, snapshot.length)
    # mlx-lm's Gemma would take what stands behind its caches for those of the layers that share keys. So a draft
    # model's are kept only where the caller has made room for them.
    if attached and (len(caches) > len(own) or not isinstance(attached[0], Aside)):
        caches[len(own) :] = _drafters(pair, attached, held[len(own) :], snapshot)


def _drafters(pair: Pair, attached: list[LayerCache], held: list[Held], snapshot: Snapshot) -> list[Any]:
    """Caches that hold what a drafter has read, or nothing where it has not read all."""
    extra = _extra(pair)
    parts = [part for layer, one in zip(attached, held, strict=True) for part in _apart(layer, one)]
    if not snapshot.ready or not all(rows or whole for rows, whole in parts):
        return extra
    layers = [inner for layer in attached for inner in _inner(layer)]
    for number, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        extra[number] = _filled(layer, extra[number], part, snapshot.length)
    if snapshot.state:
        extra[-1].cache = list(snapshot.state)
    return extra


def _apart(layer: LayerCache, held: Held) -> list[Held]:
    """What is held for each of a layer's `_inner` ones: nothing for a draft model that has yet to read a block."""
    if not isinstance(layer, Aside):
        return [held]
    whole, unread = held.whole
    return [Held([], []) if unread else Held(*one) for one in zip(held.rows, whole, strict=True)]


def _filled(layer: LayerCache, cache: Any, held: Held, end: int) -> Any:
    """A cache of mlx-lm's that holds what a layer does: the given one, unless it must become a quantised one."""
    match layer:
        case RecurrentCache():
            cache.cache = list(held.whole)
        case SlidingCache():
            keys, values = held.whole
            cache.state = (keys, values, end, 0, layer.window, keys.shape[2])
        case QuantisedCache():
            if type(cache) is KVCache:
                cache = QuantizedKVCache(layer.group, layer.bits)
            cache.state = (tuple(held.rows[:3]), tuple(held.rows[3:]), end, layer.group, layer.bits)
        case FullCache():
            cache.state = (*held.rows, end)
    return cache
