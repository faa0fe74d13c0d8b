"""Text -> token ids, with the very ids that were generated for it where it has been seen before.

A prompt cache is hit only where ids agree, and a reply that is tokenised again need not give the ids of which it was
made. So what the tokenizer would have split differently is remembered: from one added token (`<|im_end|>`, `</think>`)
to the next, together with all ids before it. For the rest the tokenizer decides, on the text as a whole.
"""

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

BUDGET = 16 << 20  # bytes
_OVERHEAD = 256  # bytes of an entry beside its text and ids, roughly


class Border(NamedTuple):
    """An added token: where it is among the ids, and where its text begins and ends."""

    at: int
    start: int
    end: int
    reach: int  # where the white space begins that it swallows; `start` for most tokens


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and the added tokens among them. A tokenizer that tells no places has no borders."""

    ids: list[int]
    borders: tuple[Border, ...] = ()


class Replay:
    """The tokenizer, and what it would tokenise otherwise. Several threads may use it."""

    def __init__(self, tokenizer: TokenizerWrapper, budget: int = BUDGET):
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        self._anchor = list(self._added)[:1]
        self._runs = _Runs(budget)
        self._lock = Lock()
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        # A class of its own may change the text on its way to the tokenizer; its places are then others.
        if self._backend is not None and self._backend.encode(_SAMPLE, add_special_tokens=False).ids != self._plain():
            self._backend = None
        self._head, self._tail = self._frame()

    @property
    def nbytes(self) -> int:
        """Bytes that the memory takes, roughly."""
        return self._runs.nbytes

    def encode(self, text: str, special: bool = False) -> Encoded:
        """Token ids of a text. `special` adds what the tokenizer adds to a text that stands alone, such as BOS."""
        if self._backend is None:
            return Encoded(self._tokenizer.encode(text, add_special_tokens=special))
        head, tail = (self._head, self._tail) if special else ([], [])
        read = self._read(text)
        with self._lock:
            if self._runs.nbytes:
                read = self._replayed(text, read, head)
        shift = len(head)
        borders = tuple(border._replace(at=border.at + shift) for border in read.borders)
        return Encoded([*head, *read.ids, *tail], borders)

    def remember(self, ids: Sequence[int]) -> None:
        """Let the text of these ids be encoded as they are, for as long as the memory allows."""
        if self._backend is None:
            return
        ids, text = list(ids), self._decode(ids)
        read = self._read(text)
        if read.ids == ids:
            return
        found = [
            (before, run)
            for before, whole in _differing(ids, self._borders_of(ids, text), text, read)
            for run in (whole, self._trimmed(whole))
            if run is not None
        ]
        with self._lock:
            for before, run in found:
                self._runs.put(before, run)

    def _read(self, text: str) -> Encoded:
        """What the tokenizer makes of a text."""
        encoding = self._backend.encode(text, add_special_tokens=False)  # type: ignore[union-attr]
        ids: list[int] = encoding.ids
        places = [(i, token) for i, token in enumerate(ids) if token in self._added]
        if not places:
            return Encoded(ids)
        spans = encoding.offsets
        return Encoded(ids, tuple(self._border(i, token, text, *spans[i]) for i, token in places))

    def _border(self, index: int, token: int, text: str, start: int, end: int) -> Border:
        added, core = self._added[token], text[start:end]
        left = len(core) - len(core.lstrip()) if added.lstrip else 0
        right = len(core) - len(core.rstrip()) if added.rstrip else 0
        return Border(index, start + left, end - right, start)

    def _replayed(self, text: str, read: Encoded, head: list[int]) -> Encoded:
        """What the tokenizer made of a text, with remembered ids in their places."""
        ids, borders, trail = list[int](), list[Border](), _Trail(head)
        stops = [*read.borders, Border(len(read.ids), len(text), len(text), len(text))]
        starts = [stop.start for stop in stops]
        at, place, i = 0, 0, 0
        while i < len(stops):
            i, run = self._found(trail, text, place, stops, starts, i) or (i, read.ids[at : stops[i].at])
            stop = stops[i]
            run = [*run, *read.ids[stop.at : stop.at + 1]]
            ids += run
            trail.add(run)
            borders.append(stop._replace(at=len(ids) - 1))
            at, place, i = stop.at + 1, stop.end, i + 1
        return Encoded(ids, tuple(borders[:-1]))

    def _found(
        self, trail: "_Trail", text: str, place: int, stops: list[Border], starts: list[int], i: int
    ) -> tuple[int, list[int]] | None:
        """Remembered ids for the text from a place on, and the border at which their text ends."""
        for run in self._runs.get(trail.digest):
            if text.startswith(run.text, place):
                end = place + len(run.text)
                j = bisect_left(starts, end, lo=i)
                if j < len(stops) and stops[j].reach <= end:
                    return j, list(run.ids)
        return None

    def _borders_of(self, ids: list[int], text: str) -> list[Border]:
        """The added tokens among ids, in the ids' text; empty where its pieces do not make up the text."""
        indices = [i for i, token in enumerate(ids) if token in self._added]
        if not indices:
            return []
        borders, place = [], len(self._decode(ids[: indices[0]]))
        for i, following in zip(indices, [*indices[1:], len(ids)], strict=True):
            end = place + len(self._within(ids[i : i + 1]))
            borders.append(Border(i, place, end, place))
            place = end + len(self._within(ids[i + 1 : following]))
        return borders if place == len(text) else []

    def _within(self, ids: list[int]) -> str:
        """The text of ids that do not come first; a decoder may strip a space where a text begins."""
        return self._decode(self._anchor + ids)[len(self._decode(self._anchor)) :] if ids else ""

    def _trimmed(self, run: "_Run") -> "_Run | None":
        """A run without white space at its end, which templates strip; none where a token holds both."""
        text, ids = run.text.rstrip(), list(run.ids)
        if not text or text == run.text:
            return None
        count = bisect_left(range(len(ids)), len(text), key=lambda count: len(self._within(ids[:count])))
        ids = ids[:count]
        return _Run(text, array("I", ids)) if self._within(ids) == text else None

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _plain(self) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_SAMPLE, add_special_tokens=False)
        return ids

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text that stands alone."""
        bare, full = self._plain(), self._tokenizer.encode(_SAMPLE, add_special_tokens=True)
        for i in range(len(full) - len(bare) + 1):
            if full[i : i + len(bare)] == bare:
                return full[:i], full[i + len(bare) :]
        self._backend = None
        return [], []


_SAMPLE = "a\nb"


class _Run(NamedTuple):
    """A stretch of text between added tokens, and the ids that it was made of."""

    text: str
    ids: "array[int]"

    @property
    def nbytes(self) -> int:
        return 4 * (len(self.text) + len(self.ids)) + _OVERHEAD


class _Trail:
    """All ids so far, as a digest."""

    def __init__(self, ids: Sequence[int] = ()):
        self._hash = blake2b(digest_size=16)
        self.add(ids)

    def add(self, ids: Sequence[int]) -> None:
        self._hash.update(array("I", ids).tobytes())

    @property
    def digest(self) -> bytes:
        return self._hash.copy().digest()


class _Runs:
    """What came after which ids. The longest unused goes first once there is more than the budget."""

    def __init__(self, budget: int):
        self.nbytes = 0
        self._budget = budget
        self._after = OrderedDict[bytes, dict[str, _Run]]()

    def get(self, before: bytes) -> list[_Run]:
        """Runs after these ids, the longest first."""
        if before not in self._after:
            return []
        self._after.move_to_end(before)
        return sorted(self._after[before].values(), key=lambda run: -len(run.text))

    def put(self, before: bytes, run: _Run) -> None:
        if run.nbytes > self._budget:
            return
        known = self._after.setdefault(before, {})
        self._after.move_to_end(before)
        self.nbytes += run.nbytes - (known[run.text].nbytes if run.text in known else 0)
        known[run.text] = run
        while self.nbytes > self._budget:
            self._drop()

    def _drop(self) -> None:
        before = next(iter(self._after))
        texts = self._after[before]
        self.nbytes -= texts.pop(next(iter(texts))).nbytes
        if not texts:
            del self._after[before]


def _differing(ids: list[int], mine: list[Border], text: str, read: Encoded) -> Iterator[tuple[bytes, _Run]]:
    """Each stretch between two added tokens that both sides have in which the tokenizer differs, and what precedes."""
    theirs = {(border.start, border.end, read.ids[border.at]): border.at for border in read.borders}
    common = [(border, theirs[key]) for border in mine if (key := (border.start, border.end, ids[border.at])) in theirs]
    common.append((Border(len(ids), len(text), len(text), len(text)), len(read.ids)))
    trail, at, other, place = _Trail(), 0, 0, 0
    for border, index in common:
        run = ids[at : border.at]
        if run != read.ids[other:index]:
            yield trail.digest, _Run(text[place : border.start], array("I", run))
        trail.add(ids[at : border.at + 1])
        at, other, place = border.at + 1, index + 1, border.end
