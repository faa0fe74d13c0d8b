"""The prompt cache: what a pair has read before is not read again. In memory, bounded in bytes.

Snapshots stand in a trie of their tokens. A text goes on from the longest one that it begins with, and leaves snapshots
where others may go on: at the end of its prompt, where a caller marks the end of a message, where it has left the
way of earlier texts, every few thousand tokens, and wherever it ends or is broken off.

With a store they are on disk too, but for waypoints that have been of no use: those are many and large, and there on
the off-chance. Nothing is written while a request waits, only when `flush` is called.
"""

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from mtp_mlx import memory
from mtp_mlx.admission import Claims
from mtp_mlx.choosing import Callables, Rules
from mtp_mlx.sequence import Sequence
from mtp_mlx.snapshots import Snapshot, blank, outline, restore
from mtp_mlx.store import Store
from mtp_mlx.trie import Trie
from mtp_mlx.types import Pair

EVERY = 4096  # tokens of a prompt between two waypoints, or a power of two as many
WAYPOINTS = 8  # on one prompt at most: each may take hundreds of megabytes, however few tokens lie between
NEAR = 64  # tokens that are read again in less time than a snapshot is worth
FAR = 4  # times as many must be saved for a snapshot to be loaded from disk
LAST = 10.0  # seconds for writing when the program ends


class Usage(NamedTuple):
    """What a store has been good for."""

    texts: int = 0
    hits: int = 0  # texts that went on from a snapshot
    tokens: int = 0  # in all prompts
    saved: int = 0  # of them, those that needed not be read
    evicted: int = 0  # snapshots
    snapshots: int = 0  # held now
    nbytes: int = 0  # held now
    disk_hits: int = 0  # of the hits, those for which a snapshot was loaded from disk
    disk_nbytes: int = 0  # on disk now
    disk_discarded: int = 0  # texts on disk that were damaged or not ours


@dataclass(eq=False)
class _Entry:
    snapshot: Snapshot
    waypoint: bool  # nothing ends here; it is held as long as there is room for it
    saved: bool = False  # it is on disk, or was and had to go, or does not go there


class _Write(NamedTuple):
    """What is being written to disk."""

    entry: _Entry
    slices: Generator[None, None, None]


class Prefixes:
    """What texts of one pair have begun with, `budget` bytes of it at most.

    All of it belongs to the thread that runs the pair. `every` is the distance of waypoints, `near` how many tokens
    must have been read since the last snapshot for another one to be taken, at least 1. What texts hold while they
    are read and written is not counted, but what they have been promised is left to them. `store` is where snapshots
    are kept for the time after a restart.
    """

    offset = 0  # tokens that stand before every prompt

    def __init__(self, pair: Pair, budget: int, every: int = EVERY, near: int = NEAR, store: Store | None = None):
        self.pair, self.budget, self.every, self.near = pair, budget, every, near
        self._disk = store
        self._write: _Write | None = None
        self._trie = Trie[_Entry]()
        self._entries: list[_Entry] = []  # the one that was used last stands last
        self._texts: list[Text] = []  # that are being read or written
        self._usage = Usage()

    @property
    def nbytes(self) -> int:
        """Bytes held, each part that snapshots share counted once."""
        return _nbytes(self._entries)

    @property
    def usage(self) -> Usage:
        usage = self._usage._replace(snapshots=len(self._entries), nbytes=self.nbytes)
        if self._disk:
            usage = usage._replace(disk_nbytes=self._disk.nbytes, disk_discarded=self._disk.discarded)
        return usage

    @property
    def evictable(self) -> int:
        """Bytes held that nobody uses."""
        used = self._used()
        return self.nbytes - _nbytes(entry for entry in self._entries if id(entry) in used)

    @property
    def claims(self) -> Claims:
        """Of the texts that are being read or written."""
        return Claims.of((text.sequence.nbytes, text.promised) for text in self._texts)

    def open(self, prompt: list[int], chooser: Rules | Callables, seed: int = 0, promised: int = 0) -> "Text":
        """A text that begins with as much of a prompt as is stored; its last token is always read again.

        The prompt has at least one token. `promised` is how many bytes its sequence may take.
        """
        value, agreeing, beyond = self._trie.match(prompt[:-1])
        entry, snapshot = value, value.snapshot if value else None
        if beyond and beyond.snapshot.cuttable and agreeing > (snapshot.length if snapshot else 0):
            entry, snapshot = beyond, beyond.snapshot.until(agreeing)
        if self._disk:
            agreeing = max(agreeing, self._disk.match(prompt[:-1]).length)
            loaded = self._load(self._disk, prompt[:-1], snapshot.length if snapshot else 0)
            if loaded:
                entry, snapshot = self._take_in(loaded), loaded
        if entry:
            self._touch(entry)
            entry.waypoint = False
        sequence = _sequence(self.pair, chooser, snapshot, prompt, seed)
        text = Text(self, sequence, prompt, entry, snapshot, agreeing, promised)
        self._texts.append(text)
        self._count(text)
        return text

    def flush(self, seconds: float) -> bool:
        """Write to disk what is not there yet, for about so long and a slice at least; whether more is left.

        The newest comes first. What is evicted before its turn is not written.
        """
        end = time.monotonic() + seconds
        while self._disk and (write := self._write or self._next(self._disk)):
            try:
                next(write.slices)
                self._write = write
            except StopIteration:
                self._write, write.entry.saved = None, True
            if time.monotonic() >= end:
                break
        return self._disk is not None and (self._write is not None or self._unsaved() is not None)

    def close(self) -> None:
        """Write what there is time for, and let go of the store. Texts may still be read, from memory."""
        self.flush(LAST)
        self._stop_writing()
        if self._disk:
            self._disk.close()
            self._disk = None

    def _unsaved(self) -> _Entry | None:
        return next((entry for entry in reversed(self._entries) if not (entry.saved or entry.waypoint)), None)

    def _next(self, disk: Store) -> _Write | None:
        """Begin to write an entry."""
        while entry := self._unsaved():
            snapshot = entry.snapshot
            # What a draft model has not read yet makes shapes that cannot be foreseen, so could not be checked.
            if not disk.holds(snapshot.tokens) and snapshot.is_like(blank(self.pair, snapshot.length)):
                return _Write(entry, disk.save(snapshot))
            entry.saved = True
        return None

    def _stop_writing(self) -> None:
        if self._write:
            self._write.slices.close()
            self._write = None

    def _load(self, disk: Store, text: list[int], known: int) -> Snapshot | None:
        """What is on disk of a text, if that is so much more than what is known that it is worth the time."""
        while (found := disk.match(text).value) and found.length >= known + FAR * self.near:
            snapshot = disk.load(found, blank(self.pair, found.length))
            if snapshot:
                return snapshot
        return None

    def _take_in(self, snapshot: Snapshot) -> _Entry | None:
        """Hold what was loaded, if there is room; otherwise one text alone goes on from it."""
        self._usage = self._usage._replace(disk_hits=self._usage.disk_hits + 1)
        entry = _Entry(snapshot, waypoint=False, saved=True)
        return entry if self._add(entry) else None

    def _count(self, text: "Text") -> None:
        texts, hits, tokens, saved, *rest = self._usage
        hits += text.cached > 0
        self._usage = Usage(texts + 1, hits, tokens + len(text.prompt), saved + text.cached, *rest)

    def leave(self, text: "Text") -> None:
        """A text is not read or written any more."""
        self._texts.remove(text)

    def store(self, text: "Text", waypoint: bool) -> None:
        """Store a text as far as it has been read, if there is room, and let it go on from there.

        A waypoint has no right to the room of anything but waypoints.
        """
        entry = self._trie.get(text.sequence.text[:-1])
        if entry:
            self._touch(entry)
            entry.waypoint &= waypoint
        else:
            entry = _Entry(outline(text.sequence, text.base), waypoint)
            if not self._add(entry, text):
                return
        text.entry, text.base = entry, entry.snapshot

    def _add(self, entry: _Entry, text: "Text | None" = None) -> bool:
        """Hold an entry, if there is room for it."""
        if not self._make_room(entry, text):
            return False
        entry.snapshot.compute()
        self._entries.append(entry)
        self._trie.put(entry.snapshot.tokens, entry)
        return True

    def _touch(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)
        if self._disk and entry.saved:
            self._disk.touch(entry.snapshot.tokens)

    def release(self, nbytes: int) -> None:
        """Evict so many bytes, or all that nobody uses: a text needs them for itself."""
        wanted, used = self.nbytes - nbytes, self._used()
        free = [entry for entry in self._entries if id(entry) not in used]
        for victim in sorted(free, key=lambda entry: not entry.waypoint):
            if nbytes <= 0 or self.nbytes <= wanted:
                return
            self._evict([victim])

    def _make_room(self, entry: _Entry, text: "Text | None") -> bool:
        """Evict what has to go for an entry of a text; nothing where that would not be enough."""
        rest, victims = self._entries.copy(), list[_Entry]()
        limit = min(self.budget, self.nbytes + memory.free_bytes() - self.claims.due)
        for victim in self._victims(entry, text):
            if _nbytes([*rest, entry]) <= limit:
                break
            rest.remove(victim)
            victims.append(victim)
        if _nbytes([*rest, entry]) > limit:
            return False
        self._evict(victims)
        return True

    def _evict(self, victims: list[_Entry]) -> None:
        if self._write and self._write.entry in victims:
            self._stop_writing()
        for victim in victims:
            self._trie.remove(victim.snapshot.tokens)
            self._entries.remove(victim)
        self._usage = self._usage._replace(evicted=self._usage.evicted + len(victims))

    def _victims(self, entry: _Entry, text: "Text | None") -> list[_Entry]:
        """What may be evicted: waypoints, then others, each beginning with what was not used for longest.

        What other texts that are being read or written go on from stays; this one will go on from its new entry.
        """
        used = self._used(but=text)
        free = [other for other in self._entries if id(other) not in used]
        others = [] if entry.waypoint else [other for other in free if not other.waypoint]
        return [other for other in free if other.waypoint] + others

    def _used(self, but: "Text | None" = None) -> set[int]:
        """What texts that are being read or written go on from."""
        return {id(text.entry) for text in self._texts if text is not but}


class Text:
    """A text that is read and written with a store's help: `with prefixes.open(...) as text`.

    Whatever ends it, what has been read is stored: a reply is there for the next turn, and a prompt that was broken
    off goes on at its last chunk. Only an error stores nothing.
    """

    def __init__(
        self,
        prefixes: Prefixes,
        sequence: Sequence,
        prompt: list[int],
        entry: _Entry | None,
        base: Snapshot | None,
        agreeing: int,
        promised: int,
    ):
        self.sequence = sequence
        self.prompt = prompt
        self.cached = base.length if base else 0  # tokens of the prompt that need not be read
        self.entry = entry  # what it goes on from, which is not evicted meanwhile
        self.base = base  # its snapshot, perhaps cut
        self.promised = promised  # bytes that its sequence may take
        self._agreeing = agreeing  # tokens of the prompt that some stored text begins with
        self._prefixes = prefixes

    def read(self, step: int, marks: Iterable[int] = ()) -> Iterator[int]:
        """Read the prompt up to its last token, `step` tokens at a time; how many are read, after each chunk.

        `marks` are numbers of tokens after which other texts are expected to differ: ends of messages.
        """
        last = len(self.prompt) - 1
        ends = {*(mark for mark in marks if self.cached < mark < last), self._agreeing, last}
        for stop in sorted(ends | set(self._waypoints(last))):
            begun = len(self.sequence.text)
            for read in self.sequence.chunks(self.prompt[begun : stop + 1], step):
                if read:
                    yield self.sequence.length
            self.keep(waypoint=stop not in ends)

    def _waypoints(self, last: int) -> range:
        """Places on a grid that is the same for all texts, or for all that are long."""
        every = self._prefixes.every
        while (last - self.cached) // every > WAYPOINTS:
            every *= 2
        return range(self.cached // every * every + every, last, every)

    def keep(self, waypoint: bool = False) -> None:
        """Store the text as far as it has been read, unless that is hardly more than what is stored of it."""
        known = self.base.length if self.base else 0
        if self._prefixes.budget and self.sequence.length >= known + self._prefixes.near:
            self._prefixes.store(self, waypoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or not issubclass(kind, Exception):
                self.keep()
        finally:
            self._prefixes.leave(self)


def _sequence(
    pair: Pair, chooser: Rules | Callables, snapshot: Snapshot | None, prompt: list[int], seed: int
) -> Sequence:
    """A sequence that has read what is in a snapshot of a prompt, with room for the rest."""
    if snapshot:
        return restore(pair, chooser, snapshot, prompt[snapshot.length], seed, room=len(prompt))
    sequence = Sequence(pair, chooser, seed)
    sequence.cache.reserve(len(prompt))
    return sequence


def _nbytes(entries: Iterable[_Entry]) -> int:
    """Bytes of snapshots, each part once."""
    snapshots = [entry.snapshot for entry in entries]
    parts = {id(part): part.nbytes for snapshot in snapshots for part in snapshot.parts}
    return sum(parts.values()) + sum(snapshot.own_nbytes for snapshot in snapshots)
