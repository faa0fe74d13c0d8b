"""The prompt cache on disk: snapshots of one pair that survive a restart, used as they were written or not at all.

Each pair has a folder of its own, named by all that decides about its numbers, and one process at a time uses it. A
text is a manifest, which is written last, and files of tensors; rows that texts share are in one file. Whatever is
damaged, cut short or not ours is deleted with a line in the log, and the text is read anew by the model.
"""

import fcntl
import hashlib
import logging
import os
import re
import time
from array import array
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from mtp_mlx.manifest import FORMAT, Manifest, Piece
from mtp_mlx.sealing import RECORD, TEMPORARY, TENSORS, DamagedError, read_tensors, size, write_tensors
from mtp_mlx.snapshots import Part, Snapshot
from mtp_mlx.trie import Match, Trie

if TYPE_CHECKING:
    from mtp_mlx.loading import Loaded

LOCK = "lock"
_FOLDER = re.compile(r"[0-9a-f]{32}")  # what a pair's is called

_log = logging.getLogger(__name__)


class Store:
    """Snapshots of one pair in its own folder below `folder`. All of it belongs to the thread that runs the pair.

    `budget` is in bytes and holds for all pairs below `folder` together, but for those that other processes use. What
    was not used for longest is deleted first: of this pair text by text, other pairs as a whole.
    """

    def __init__(self, folder: Path, identity: str, budget: int, lock: int):
        self.budget, self.discarded = budget, 0
        self._folder, self._identity, self._lock = folder, identity, lock
        self._texts: dict[str, Manifest] = {}  # by the names of their files, the one that was used last at the end
        self._trie = Trie[Manifest]()
        self._sizes: dict[str, int] = {}  # bytes of every file
        self._pinned: set[str] = set()  # files of the snapshot that is being written
        # Rows in memory that are those of a file: neither written nor held twice.
        self._files: WeakKeyDictionary[Part, str] = WeakKeyDictionary()
        self._parts: WeakValueDictionary[str, Part] = WeakValueDictionary()
        self._writes = True
        self._others = sorted(_others(folder), key=lambda other: other.used)
        self._clean()

    @classmethod
    def open(cls, folder: Path, identity: str, budget: int) -> "Store | None":
        """None, with a warning, where there can be no store: the folder cannot be written, or is in use."""
        own = folder / hashlib.sha256(identity.encode()).hexdigest()[:32]
        lock = None
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            own.mkdir(0o700, exist_ok=True)
            own.chmod(0o700)
            lock = _lock(own)
            if lock is not None:
                return cls(own, identity, budget, lock)
            _log.warning("another process keeps this model's prompts in %s; this one keeps none on disk", folder)
        except OSError as error:
            _log.warning("no prompts are kept on disk: %s (%s)", error.strerror, folder)
            if lock is not None:
                os.close(lock)
        return None

    def close(self) -> None:
        """Another process may use the folder now."""
        os.close(self._lock)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of this pair's texts."""
        return sum(self._sizes.values())

    def match(self, text: Sequence[int]) -> Match[Manifest]:
        """What is known of a text."""
        return self._trie.match(text)

    def holds(self, text: Sequence[int]) -> bool:
        return self._trie.get(text) is not None

    def touch(self, text: Sequence[int]) -> None:
        """A text was used, if it is held: the time of its manifest says so after a restart too."""
        manifest = self._trie.get(text)
        if manifest is None:
            return
        self._texts[manifest.name] = self._texts.pop(manifest.name)
        try:
            self._stamp(manifest)
        except FileNotFoundError:  # somebody has deleted it
            self._remove(manifest)
            self._sweep()
        except OSError as error:
            self._give_up(error)

    def load(self, manifest: Manifest, blank: Snapshot) -> Snapshot | None:
        """A stored snapshot, if it is all as it was written and `blank` is like it; otherwise it is discarded."""
        try:
            parts = tuple(self._part(piece, blank.parts[0]) for piece in manifest.pieces)
            whole, state = self._own(manifest.own, blank)
            snapshot = Snapshot(manifest.tokens.tolist(), parts, whole, state, manifest.ready)
            if not snapshot.is_like(blank):
                raise DamagedError(manifest.name, "has tensors of other shapes than this model")
        except DamagedError as error:
            others = [other for other in self._texts.values() if error.file in other.files]
            self._discard(error, {manifest, *others})
            return None
        self.touch(manifest.tokens)
        return snapshot

    def save(self, snapshot: Snapshot) -> Generator[None, None, None]:
        """Write a snapshot a slice at a time, if there is room for it; one by one. Closed early, it leaves nothing."""
        try:
            yield from self._save(snapshot)
        except OSError as error:
            self._give_up(error)

    def _save(self, snapshot: Snapshot) -> Generator[None, None, None]:
        held = {self._files[part] for part in snapshot.parts if part in self._files}
        self._pinned = held & self._sizes.keys()
        try:
            if not self._writes or not self._make_room(self._cost(snapshot)):
                return
            pieces = list[Piece]()
            for part in snapshot.parts:
                pieces.append(Piece(part.start, (yield from self._write_part(part))))
            own = yield from self._write(_own_tensors(snapshot))
            manifest = Manifest(array("i", snapshot.tokens), snapshot.ready, tuple(pieces), own)
            manifest.write(self._folder, self._identity)
            self._stamp(manifest)
            self._add(manifest)
        finally:
            self._pinned = set()
            self._sweep()
        self._make_room(0)  # in case that it was more

    def _write_part(self, part: Part) -> Generator[None, None, str]:
        name = self._files.get(part)
        if name is None or name not in self._sizes:
            name = yield from self._write(_named(part.rows))
            self._know(part, name)
        return name

    def _write(self, tensors: dict[str, mx.array]) -> Generator[None, None, str]:
        name = yield from write_tensors(self._folder, tensors)
        self._pinned.add(name)
        self._sizes[name] = (self._folder / name).stat().st_size
        return name

    def _know(self, part: Part, name: str) -> None:
        self._files[part], self._parts[name] = name, part

    def _part(self, piece: Piece, blank: Part) -> Part:
        known = self._parts.get(piece.file)
        if known is not None and known.start == piece.start:
            return known
        part = Part(piece.start, _like(blank.rows, self._read(piece.file), piece.file))
        self._know(part, piece.file)
        return part

    def _own(self, name: str, blank: Snapshot) -> tuple[list[Any], tuple[mx.array, ...]]:
        """What cannot be cut, and the drafter's state, which may be none yet."""
        tensors = self._read(name)
        told = any(tensor.startswith("state.") for tensor in tensors)
        tree = _like({"whole": blank.whole, "state": list(blank.state) if told else []}, tensors, name)
        return tree["whole"], tuple(tree["state"])

    def _read(self, name: str) -> dict[str, mx.array]:
        try:
            return read_tensors(self._folder / name)
        except OSError as error:
            raise DamagedError(name, f"cannot be read: {error.strerror}") from error

    def _clean(self) -> None:
        """Take in what earlier runs have left, and delete what a crash has."""
        for path in self._folder.glob("*" + TEMPORARY):
            path.unlink()
        self._sizes = {path.name: path.stat().st_size for path in self._folder.glob("*" + TENSORS)}
        found = sorted(self._folder.glob("*" + RECORD), key=lambda path: path.stat().st_mtime_ns)
        problems = [error for path in found if (error := self._take_in(path))]
        if problems:
            self._tell(problems[0], len(problems))
        self._sweep()
        self._make_room(0)

    def _take_in(self, path: Path) -> DamagedError | None:
        try:
            manifest = Manifest.read(path, self._identity)
            if absent := manifest.files - self._sizes.keys():
                raise DamagedError(min(absent), "is gone")
        except DamagedError as error:
            path.unlink()
            return error
        self._add(manifest)
        return None

    def _add(self, manifest: Manifest) -> None:
        self._texts.pop(manifest.name, None)
        self._texts[manifest.name] = manifest
        self._trie.put(manifest.tokens, manifest)
        self._sizes[manifest.name] = (self._folder / manifest.name).stat().st_size

    def _stamp(self, manifest: Manifest) -> None:
        """Used now. The system's own stamps may be milliseconds old."""
        now = time.time_ns()
        os.utime(self._folder / manifest.name, ns=(now, now))

    def _discard(self, error: DamagedError, manifests: Collection[Manifest]) -> None:
        self._tell(error, len(manifests))
        for manifest in manifests:
            self._remove(manifest)
        self._sweep()

    def _tell(self, error: DamagedError, count: int) -> None:
        _log.warning("%d texts of the prompt cache on disk are discarded and will be read again: %s", count, error)
        self.discarded += count

    def _remove(self, manifest: Manifest) -> None:
        """Its manifest first: files that nobody refers to are deleted, a manifest without its files is an error."""
        if self._texts.pop(manifest.name, None):
            self._trie.remove(manifest.tokens)
            self._delete(manifest.name)

    def _sweep(self) -> None:
        """Delete the files that no text consists of."""
        used = {*self._texts, *self._pinned}.union(*(manifest.files for manifest in self._texts.values()))
        for name in self._sizes.keys() - used:
            self._delete(name)

    def _delete(self, name: str) -> None:
        del self._sizes[name]
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)

    def _cost(self, snapshot: Snapshot) -> int:
        """Bytes that writing a snapshot adds."""
        new = [_named(part.rows) for part in snapshot.parts if self._files.get(part) not in self._sizes]
        tensors = sum(size(named) for named in [*new, _own_tensors(snapshot)])
        return tensors + Manifest.size(snapshot.tokens, len(snapshot.parts))

    def _make_room(self, needed: int) -> bool:
        """Delete what has to go for so many bytes; nothing where that would not be enough."""
        if needed + sum(self._sizes[name] for name in self._pinned) > self.budget:
            return False
        while needed + self.nbytes + sum(other.nbytes for other in self._others) > self.budget:
            self._evict()
        return True

    def _evict(self) -> None:
        """Delete what was not used for longest. There is something: what is over the budget is not only pinned."""
        oldest = next(iter(self._texts.values()), None)
        if self._others and (oldest is None or self._others[0].used < _used(self._folder / oldest.name)):
            self._others.pop(0).delete()
        else:
            assert oldest is not None
            self._remove(oldest)
            self._sweep()

    def _give_up(self, error: OSError) -> None:
        if self._writes:
            self._writes = False
            _log.warning("no more prompts are kept on disk: %s (%s)", error.strerror, self._folder)


@dataclass(frozen=True)
class _Other:
    """The texts of another pair."""

    folder: Path
    used: int
    nbytes: int

    def delete(self) -> None:
        """Unless a process has begun to use it."""
        lock = _lock(self.folder)
        if lock is None:
            return
        for path in self.folder.iterdir():
            if path.suffix in (RECORD, TENSORS, TEMPORARY) or path.name == LOCK:
                path.unlink()
        os.close(lock)
        with suppress(OSError):  # somebody has put something there
            self.folder.rmdir()


def _others(folder: Path) -> Iterator[_Other]:
    """Beside a pair's folder, those of other pairs that nobody uses."""
    for other in folder.parent.iterdir():
        if other == folder or not _FOLDER.fullmatch(other.name) or not (other / LOCK).is_file():
            continue
        lock = _lock(other)
        if lock is not None:
            os.close(lock)
            files = [path.stat() for path in other.iterdir()]
            times = [_used(path) for path in other.glob("*" + RECORD)]
            yield _Other(other, max(times, default=0), sum(file.st_size for file in files))


def _used(manifest: Path) -> int:
    return manifest.stat().st_mtime_ns


def _lock(folder: Path) -> int | None:
    """Lock a folder as long as what is returned stays open; None where another process has."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _own_tensors(snapshot: Snapshot) -> dict[str, mx.array]:
    """What a snapshot shares with no other."""
    return _named({"whole": snapshot.whole, "state": list(snapshot.state)})


def _named(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def _like(tree: Any, tensors: dict[str, mx.array], name: str) -> Any:
    """The tensors of a file, by their names, in the places of a tree of just these names."""
    if tensors.keys() != _named(tree).keys():
        raise DamagedError(name, "has tensors of another model")
    return tree_map_with_path(lambda path, _: tensors[path], tree)


# --------------------------------------------------------------------------- whose numbers they are

_BLOCK, _BLOCKS = 2**16, 16  # bytes of a sample, and how many are taken of a file of weights


def identity(loaded: "Loaded") -> str:
    """All that decides about the numbers of a pair, as a hash: two with the same may use each other's snapshots."""
    info = mx.device_info()
    facts: list[Any] = [FORMAT, version("mlx"), version("mlx-lm"), mx.default_device()]
    facts += [info["architecture"], info["device_name"]]
    facts += [loaded.pair.kv_bits, type(loaded.pair.target), type(loaded.pair.drafter)]
    for network in loaded.networks:  # tells the dtype, and the bits of a drafter
        parameters = _named(network.parameters())
        facts += [(name, array.shape, array.dtype) for name, array in sorted(parameters.items())]
    digest = hashlib.sha256(repr(facts).encode())
    for place in loaded.places:
        for path in [place] if place.is_file() else sorted(place.glob("*")):
            if path.suffix in (RECORD, TENSORS):
                digest.update(_sample(path))
    return digest.hexdigest()


def _sample(path: Path) -> bytes:
    """What tells a file from others: a config as a whole; of weights the size, the time, the header, some numbers."""
    status = path.stat()
    digest = hashlib.sha256(f"{path.name} {status.st_size}".encode())
    if path.suffix == RECORD:
        digest.update(path.read_bytes())
        return digest.digest()
    digest.update(str(status.st_mtime_ns).encode())
    with path.open("rb") as file:
        start = file.read(8)
        digest.update(start + file.read(min(int.from_bytes(start, "little"), status.st_size)))
        for block in range(_BLOCKS):
            file.seek(block * max(0, status.st_size - _BLOCK) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.digest()
