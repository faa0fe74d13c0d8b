"""What is on disk is used as it was written, or not at all; nobody can tell from what is said."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import FIXTURES, PROGRAMS, gap, varied_tokens
from madeup import RING, made_up
from mlx.utils import tree_flatten
from test_snapshots import FEW, FORCED, QUANTISED, TEXT, _assert_same, _begun, _goes_on, pair_of

from mtp_mlx import manifest, sealing, store
from mtp_mlx.choosing import Rules
from mtp_mlx.loading import load_pair
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.sealing import RECORD, TEMPORARY, TENSORS, write_record, write_tensors
from mtp_mlx.sequence import Sequence
from mtp_mlx.snapshots import Part, Snapshot, blank, take
from mtp_mlx.store import Store, identity
from mtp_mlx.types import Pair

PLENTY = 2**30

few_cases = pytest.mark.parametrize(("name", "bits"), [*((name, None) for name in FEW), *QUANTISED])


# --------------------------------------------------------------------------- made-up snapshots, of no model


@cache
def _like(length: int) -> Snapshot:
    return made_up([0] * length)


def _bytes(snapshot: Snapshot) -> dict[str, tuple[object, ...]]:
    """All that it is."""
    tree = [[part.rows for part in snapshot.parts], snapshot.whole, list(snapshot.state)]
    arrays: dict[str, mx.array] = dict(tree_flatten(tree))
    held = {name: (a.shape, a.dtype, _raw(a)) for name, a in arrays.items()}
    return held | {"text": (snapshot.tokens, snapshot.ready, [part.start for part in snapshot.parts])}


def _raw(array: mx.array) -> bytes:
    flat: Any = array.reshape(-1).view(mx.uint8)
    return bytes(flat)


def _open(folder: Path, name: str = "pair", budget: int = PLENTY) -> Store:
    opened = Store.open(folder, name, budget)
    assert opened is not None
    return opened


def _save(disk: Store, *snapshots: Snapshot) -> None:
    for snapshot in snapshots:
        assert list(disk.save(snapshot)) == []


def _load(disk: Store, tokens: list[int]) -> Snapshot | None:
    """The snapshot of just these tokens."""
    found = disk.match(tokens).value
    return disk.load(found, _like(found.length)) if found and found.length == len(tokens) else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.name != store.LOCK)


@cache
def _conversation() -> tuple[Snapshot, ...]:
    """Three turns, and another text."""
    text, snapshots = varied_tokens(300), list[Snapshot]()
    for length in (50, 120, 260):
        snapshots.append(made_up(text[:length], snapshots[-1] if snapshots else None))
    return *snapshots, made_up(varied_tokens(40, seed=5))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The warnings since this was last asked."""
    caplog.set_level(logging.WARNING, "mtp_mlx")

    def new() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    yield new


Warnings = Callable[[], list[str]]


def test_what_was_saved_is_loaded_to_the_bit(tmp_path: Path, warnings: Warnings) -> None:
    disk, snapshots = _open(tmp_path), _conversation()
    _save(disk, *snapshots)
    assert len(snapshots[2].parts) == 3
    assert len(list(tmp_path.glob("*/*" + TENSORS))) == 4 + 4, "parts that are shared are written once"
    for again in (disk, None):
        if again is None:
            disk.close()
            disk = _open(tmp_path)
        for snapshot in snapshots:
            assert disk.match([*snapshot.tokens, 7]).value is not None
            loaded = _load(disk, snapshot.tokens)
            assert loaded is not None and _bytes(loaded) == _bytes(snapshot)
    assert disk.nbytes == sum(path.stat().st_size for path in _files(tmp_path)) and disk.discarded == 0
    assert not warnings()


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "below" / "cache"
        _save(_open(folder), *_conversation())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in [folder, *folder.iterdir()]} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*/*")} == {0o600}


def test_texts_that_were_loaded_share_what_they_shared(tmp_path: Path) -> None:
    snapshots = _conversation()
    disk = _open(tmp_path)
    _save(disk, *snapshots)
    disk.close()
    disk = _open(tmp_path)
    first, second = _load(disk, snapshots[1].tokens), _load(disk, snapshots[2].tokens)
    assert first and second and first.parts[0] is second.parts[0] and first.parts[1] is second.parts[1]
    before = len(_files(tmp_path))
    _save(disk, made_up(varied_tokens(300), second))  # goes on from what was loaded
    assert len(_files(tmp_path)) == before + 3, "a part, what cannot be cut, a manifest"
    again = _load(disk, varied_tokens(300))
    assert again and again.parts[:3] == second.parts


# --------------------------------------------------------------------------- faults


def _truncate(path: Path, share: float) -> None:
    os.truncate(path, min(int(path.stat().st_size * share), path.stat().st_size - 1))


def _flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * share), len(content) - 1)] ^= 4
    path.write_bytes(content)


def _delete(path: Path, share: float) -> None:
    path.unlink()


FAULTS = [(_truncate, 0.0), (_truncate, 0.4), (_truncate, 1.0)]
FAULTS += [(_flip, 0.0), (_flip, 0.01), (_flip, 0.5), (_flip, 1.0), (_delete, 0.0)]


@pytest.mark.parametrize(("fault", "share"), FAULTS)
def test_what_is_damaged_is_discarded_and_nothing_else(
    tmp_path: Path, warnings: Warnings, fault: Callable[[Path, float], None], share: float
) -> None:
    snapshots, made = _conversation(), tmp_path / "made"
    _save(_open(made), *snapshots)
    for number in range(len(_files(made))):
        for early in (True, False):  # before the start, or under a store that is open
            folder = tmp_path / f"{number}{early}"
            shutil.copytree(made, folder)
            victim = _files(folder)[number]
            if victim.suffix == RECORD and not early:
                continue  # it has been read
            disk = None if early else _open(folder)
            fault(victim, share)
            disk = disk or _open(folder)
            loaded = [_load(disk, snapshot.tokens) for snapshot in snapshots]
            for mine, theirs in zip(loaded, snapshots, strict=True):
                assert mine is None or _bytes(mine) == _bytes(theirs)
            lost = loaded.count(None)
            assert 0 < lost < 4 and not victim.exists()
            expected = int(fault is not _delete or victim.suffix == TENSORS)  # without a manifest it never was
            assert len(warnings()) == expected and disk.discarded == expected * lost
            _assert_tidy(folder, disk)
            _save(disk, *snapshots)
            assert all(_load(disk, snapshot.tokens) for snapshot in snapshots), "it can be written again"
            disk.close()
            warnings()


def _assert_tidy(folder: Path, disk: Store) -> None:
    """On disk is what the store knows of, and every text has its files."""
    names = {path.name for path in _files(folder)}
    assert names == disk._sizes.keys()
    assert {name for name in names if name.endswith(RECORD)} == disk._texts.keys()
    needed = set[str]().union(*(text.files for text in disk._texts.values()))
    assert needed == {name for name in names if name.endswith(TENSORS)}
    assert all(disk.holds(text.tokens) for text in disk._texts.values())


def test_two_files_that_were_swapped_are_both_discarded(tmp_path: Path, warnings: Warnings) -> None:
    snapshots = _conversation()
    disk = _open(tmp_path)
    _save(disk, *snapshots)
    disk.close()
    one, other = [next(iter(text.pieces)).file for text in (disk._texts[name] for name in list(disk._texts)[-2:])]
    place = disk._folder
    (place / one).rename(place / "aside")
    (place / other).rename(place / one)
    (place / "aside").rename(place / other)
    disk = _open(tmp_path)
    assert [_load(disk, snapshot.tokens) for snapshot in snapshots] == [None] * 4
    assert len(warnings()) == 2
    _assert_tidy(tmp_path, disk)


def test_manifests_that_were_swapped_are_discarded(tmp_path: Path, warnings: Warnings) -> None:
    disk = _open(tmp_path)
    _save(disk, *_conversation())
    disk.close()
    one, other, *_ = sorted(disk._folder.glob("*" + RECORD))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    disk = _open(tmp_path)
    assert len(disk._texts) == 2 and disk.discarded == 2 and len(warnings()) == 1
    _assert_tidy(tmp_path, disk)


def test_texts_of_another_pair_are_not_used(tmp_path: Path, warnings: Warnings) -> None:
    theirs, mine = _open(tmp_path, "theirs"), _open(tmp_path, "mine")
    snapshot = _conversation()[0]
    _save(theirs, snapshot)
    assert _load(mine, snapshot.tokens) is None
    theirs.close()
    mine.close()
    for path in theirs._folder.iterdir():
        shutil.copy(path, mine._folder)
    mine = _open(tmp_path, "mine")
    assert not mine._texts and mine.discarded == 1 and len(warnings()) == 1
    assert [path.name for path in mine._folder.iterdir()] == [store.LOCK]


STRANGE: list[dict[str, object]] = [
    {"format": manifest.FORMAT + 1},
    {"tokens": []},
    {"tokens": [1, -2]},
    {"tokens": [2**40]},
    {"tokens": ["1"]},
    {"tokens": None},
    {"pieces": [[0, "../../etc/passwd"]]},
    {"pieces": [[0]]},
    {"pieces": 3},
    {"own": "0" * 64 + ".safetensors"},
    {"own": ["0"]},
]


def _name_of(tokens: Any) -> str | None:
    """What the manifest of a text is called, if it can be one."""
    try:
        return manifest.Manifest(array("i", tokens), True, (), "").name
    except (TypeError, OverflowError):
        return None


@pytest.mark.parametrize("change", STRANGE)
def test_a_manifest_that_nobody_here_has_written_is_discarded(
    tmp_path: Path, warnings: Warnings, change: dict[str, object]
) -> None:
    """Its hash is right: it may come from a later version, or from somebody with intentions."""
    disk = _open(tmp_path)
    _save(disk, _conversation()[0])
    disk.close()
    (path,) = disk._folder.glob("*" + RECORD)
    content = sealing.read_record(path) | change
    path.unlink()
    write_record(path.with_name(_name_of(content["tokens"]) or path.name), content)
    disk = _open(tmp_path)
    assert not disk._texts and disk.discarded == 1 and len(warnings()) == 1 and not _files(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, "\xff"])
def test_a_record_of_anything_is_discarded(tmp_path: Path, warnings: Warnings, text: str) -> None:
    disk = _open(tmp_path)
    disk.close()
    content = text.encode("latin-1")
    (disk._folder / ("0" * 64 + RECORD)).write_bytes(sealing._hash(content) + b"\n" + content)
    assert _open(tmp_path).discarded == 1 and len(warnings()) == 1 and not _files(tmp_path)


def _with(snapshot: Snapshot, **changes: Any) -> Snapshot:
    return replace(snapshot, **changes)


MISSHAPEN: dict[str, Callable[[Snapshot], Snapshot]] = {
    "rows too short": lambda s: _with(s, parts=(Part(0, made_up(s.tokens[:-1]).parts[0].rows),)),
    "rows of fewer heads": lambda s: _with(s, parts=(Part(0, _cut(s.parts[0].rows, 1)),)),
    "narrower rows": lambda s: _with(s, parts=(Part(0, _cut(s.parts[0].rows, 3)),)),
    "a gap between parts": lambda s: _with(s, parts=(made_up(s.tokens[:9]).parts[0], made_up_from(10, s))),
    "no beginning": lambda s: _with(s, parts=(made_up_from(4, s),)),
    "no parts": lambda s: _with(s, parts=()),
    "a part twice": lambda s: _with(s, parts=(s.parts[0], s.parts[0])),
    "a larger ring": lambda s: _with(s, whole=[[], [mx.zeros((1, 2, 9, 4), mx.float16)], []]),
    "a ring of another dtype": lambda s: _with(s, whole=[[], [mx.zeros((1, 2, 8, 4), mx.float32)], []]),
    "a layer more": lambda s: _with(s, whole=[[], s.whole[1], [mx.zeros((1,))]]),
    "a layer less": lambda s: _with(s, whole=[[], [], []]),
    "a wider state": lambda s: _with(s, state=(mx.zeros((1, 1, 9)),)),
    "no state": lambda s: _with(s, state=()),
}


def _cut(rows: list[list[mx.array]], axis: int) -> list[list[mx.array]]:
    return [[mx.contiguous(mx.take(array, mx.arange(1), axis=axis)) for array in layer] for layer in rows]


def made_up_from(start: int, snapshot: Snapshot) -> Part:
    rows = [[mx.contiguous(array[:, :, start:]) for array in layer] for layer in snapshot.parts[0].rows]
    mx.eval(rows)
    return Part(start, rows)


@pytest.mark.parametrize("kind", MISSHAPEN)
def test_tensors_that_do_not_fit_the_pair_are_not_used(tmp_path: Path, warnings: Warnings, kind: str) -> None:
    snapshot = made_up(varied_tokens(30))
    assert snapshot.is_like(_like(30))
    misshapen = MISSHAPEN[kind](snapshot)
    misshapen.compute()
    disk = _open(tmp_path)
    _save(disk, misshapen, made_up(varied_tokens(20, seed=3)))
    disk.close()
    disk = _open(tmp_path)
    assert _load(disk, snapshot.tokens) is None and not disk.holds(snapshot.tokens)
    assert len(warnings()) == 1 and disk.discarded == 1 and len(disk._texts) == 1
    _assert_tidy(tmp_path, disk)


def test_a_drafter_that_has_not_been_told_yet_knows_nothing(tmp_path: Path) -> None:
    snapshot = _with(made_up(varied_tokens(30)), state=(), ready=False)
    disk = _open(tmp_path)
    _save(disk, snapshot)
    loaded = _load(disk, snapshot.tokens)
    assert loaded and loaded.state == () and not loaded.ready


def test_what_a_crash_has_left_is_cleared_away(tmp_path: Path, warnings: Warnings) -> None:
    snapshots = _conversation()
    disk = _open(tmp_path)
    _save(disk, *snapshots)
    disk.close()
    list(write_tensors(disk._folder, {"orphan": mx.zeros(3)}))
    for name in ("tensors" + TEMPORARY, "0" * 64 + TEMPORARY, "0" * 64 + TENSORS):
        (disk._folder / name).write_bytes(b"half of a file")
    (disk._folder / "note.txt").write_text("not ours")
    disk = _open(tmp_path)
    (disk._folder / "note.txt").unlink()
    _assert_tidy(tmp_path, disk)
    assert len(disk._texts) == 4 and not warnings(), "there is nothing to complain of"


def test_what_is_not_written_to_its_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SLICE", 1024)
    disk, (_, second, third, _) = _open(tmp_path), _conversation()
    list(disk.save(second))
    total = sum(1 for _ in disk.save(third))
    disk._remove(disk._texts[manifest_name(third)])
    disk._sweep()
    for stop in range(1, total, max(1, total // 8)):
        writing = disk.save(third)
        for _ in range(stop):
            next(writing)
        writing.close()
        _assert_tidy(tmp_path, disk)
        assert not disk.holds(third.tokens) and disk.holds(second.tokens)


def test_what_is_discarded_between_two_slices_takes_nothing_of_the_others(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "SLICE", 1024)
    disk, (_, _, third, other) = _open(tmp_path), _conversation()
    total = sum(1 for _ in disk.save(third))
    for stop in (1, total // 2, total):
        disk._remove(disk._texts[manifest_name(third)])
        disk._sweep()
        list(disk.save(other))
        _flip(disk._folder / disk._texts[manifest_name(other)].own, 0.9)
        writing = disk.save(third)
        for _ in range(stop):
            next(writing)
        assert _load(disk, other.tokens) is None and len(warnings()) == 1
        list(writing)
        _assert_tidy(tmp_path, disk)
        disk.close()
        disk = _open(tmp_path)
        loaded = _load(disk, third.tokens)
        assert loaded and _bytes(loaded) == _bytes(third)


def test_parts_are_not_written_again(tmp_path: Path) -> None:
    disk, (first, second, third, _) = _open(tmp_path), _conversation()
    before = dict[str, int]()
    for snapshot in (first, second, third):
        _save(disk, snapshot)
        inodes = {path.name: path.stat().st_ino for path in disk._folder.glob("*" + TENSORS)}
        assert before.items() <= inodes.items()
        before = inodes


def manifest_name(snapshot: Snapshot) -> str:
    return _name_of(snapshot.tokens) or ""


# --------------------------------------------------------------------------- disks and processes


def test_a_full_disk_is_no_reason_to_stop(tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, other = _conversation()
    real = os.fsync
    for allowed in range(4):
        calls = iter([real] * allowed)

        def full(file: int, calls: Iterator[Callable[[int], None]] = calls) -> None:
            if (call := next(calls, None)) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            call(file)

        disk = _open(tmp_path / str(allowed))
        _save(disk, other)
        monkeypatch.setattr(os, "fsync", full)
        _save(disk, first, second)
        monkeypatch.setattr(os, "fsync", real)
        assert disk.holds(first.tokens) == (allowed == 3)
        assert len(warnings()) == 1
        _save(disk, third)
        assert not disk.holds(third.tokens) and _load(disk, other.tokens), "it only reads from now on"
        _assert_tidy(tmp_path / str(allowed), disk)
        disk.close()
        assert _load(_open(tmp_path / str(allowed)), other.tokens)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_not_used(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    assert Store.open(tmp_path, "pair", PLENTY) is None
    (warning,) = warnings()
    assert os.strerror(code) in warning and str(tmp_path) in warning


def test_what_keeps_a_store_from_opening_keeps_no_lock(tmp_path: Path, warnings: Warnings) -> None:
    _open(tmp_path).close()
    (lock,) = tmp_path.glob("*/" + store.LOCK)
    (lock.parent / ("folder" + RECORD)).mkdir()
    assert Store.open(tmp_path, "pair", PLENTY) is None and len(warnings()) == 1
    (lock.parent / ("folder" + RECORD)).rmdir()
    _open(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path: Path, warnings: Warnings) -> None:
    place = tmp_path / "file"
    place.write_text("something")
    assert Store.open(place, "pair", PLENTY) is None and len(warnings()) == 1
    assert place.read_text() == "something"


def test_a_disk_that_becomes_read_only_is_still_read(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = _conversation()
    disk = _open(tmp_path)
    _save(disk, *snapshots)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "utime", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    loaded = [_load(disk, snapshot.tokens) for snapshot in snapshots]
    monkeypatch.undo()
    assert all(loaded) and len(warnings()) == 1


def test_one_process_at_a_time(tmp_path: Path, warnings: Warnings) -> None:
    disk = _open(tmp_path)
    assert Store.open(tmp_path, "pair", PLENTY) is None and len(warnings()) == 1
    _open(tmp_path, "another pair")
    _save(disk, *_conversation())
    assert Store.open(tmp_path, "pair", PLENTY) is None and len(warnings()) == 1
    _assert_tidy(disk._folder.parent, disk)
    disk.close()
    assert len(_open(tmp_path)._texts) == 4


WRITER = """
    import random, sys
    from pathlib import Path
    from mtp_mlx import sealing
    from mtp_mlx.store import Store
    from madeup import made_up, text

    sealing.SLICE = 2048
    store = Store.open(Path(sys.argv[1]), "pair", 60_000)
    rng, bases = random.Random(sys.argv[2]), [None]
    for turn in range(10_000):
        base = rng.choice(bases[-3:])
        tokens = (base.tokens if base and base.length < 300 else []) + text(40, seed=rng.randrange(100))
        snapshot = made_up(tokens, base if base and base.length < 300 else None)
        for _ in store.save(snapshot):
            pass
        bases.append(snapshot)
        print(turn, flush=True)
"""


def test_a_killed_process_leaves_nothing_wrong(tmp_path: Path, warnings: Warnings) -> None:
    """Whatever it was doing; and the next one goes on in the same folder."""
    rng, path = random.Random(2), os.pathsep.join(sys.path)
    for attempt in range(2):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={"PYTHONPATH": path}) as writer:
            assert writer.stdout is not None
            for _ in range(rng.randrange(3, 25)):
                assert writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        disk = _open(tmp_path, budget=60_000)
        assert len(disk._texts) > 2 and disk.nbytes <= 60_000
        _assert_tidy(tmp_path, disk)
        for text in list(disk._texts.values()):
            loaded = _load(disk, text.tokens.tolist())
            assert loaded and loaded.whole[1][0].shape == (1, 2, RING, 4)
            rows, cold = loaded.held().rows, made_up(loaded.tokens)
            assert rows[0][0].shape == cold.parts[0].rows[0][0].shape
            assert _bytes(_with(loaded, parts=())) == _bytes(_with(cold, parts=()))
        disk.close()
    assert not warnings(), "a crash is nothing to complain of"


# --------------------------------------------------------------------------- the budget


def _one(seed: int) -> Snapshot:
    return made_up(varied_tokens(100, seed=seed))


def _size(tmp_path: Path) -> int:
    """Bytes on disk of one such snapshot."""
    disk = _open(tmp_path / "size")
    _save(disk, _one(0))
    return disk.nbytes


def test_what_was_not_used_for_longest_is_deleted_first(tmp_path: Path) -> None:
    size = _size(tmp_path)
    disk = _open(tmp_path, budget=int(3.5 * size))
    texts = [_one(seed) for seed in range(5)]
    _save(disk, *texts[:3])
    disk.touch(texts[0].tokens)
    disk.close()
    disk = _open(tmp_path, budget=int(3.5 * size))
    _save(disk, texts[3])
    assert [disk.holds(text.tokens) for text in texts] == [True, False, True, True, False]
    assert _load(disk, texts[2].tokens)
    _save(disk, texts[4])
    assert [disk.holds(text.tokens) for text in texts] == [False, False, True, True, True]
    assert disk.nbytes <= disk.budget
    _assert_tidy_below(tmp_path, disk)
    disk.close()
    disk = _open(tmp_path, budget=int(1.5 * size))
    assert [disk.holds(text.tokens) for text in texts] == [False, False, False, False, True], "a smaller budget"


def _assert_tidy_below(folder: Path, disk: Store) -> None:
    assert {path.name for path in disk._folder.iterdir()} == {store.LOCK, *disk._sizes}


def test_shared_parts_stay_as_long_as_somebody_refers_to_them(tmp_path: Path) -> None:
    snapshots = _conversation()
    disk = _open(tmp_path)
    _save(disk, *snapshots)
    for gone in (0, 1):
        disk._remove(disk._texts[manifest_name(snapshots[gone])])
        disk._sweep()
        _assert_tidy(tmp_path, disk)
        disk.close()
        disk = _open(tmp_path)
        loaded = _load(disk, snapshots[2].tokens)
        assert loaded and _bytes(loaded) == _bytes(snapshots[2])


def test_a_text_whose_shared_parts_belong_to_what_is_evicted_for_it_keeps_them(tmp_path: Path) -> None:
    first, second, *_ = _conversation()
    disk = _open(tmp_path)
    _save(disk, first, second)
    both = disk.nbytes
    disk._remove(disk._texts[manifest_name(second)])
    disk._sweep()
    disk.budget = both - 100
    _save(disk, second)
    loaded = _load(disk, second.tokens)
    assert loaded and _bytes(loaded) == _bytes(second) and not disk.holds(first.tokens)
    _assert_tidy(tmp_path, disk)


def test_what_does_not_fit_at_all_deletes_nothing(tmp_path: Path) -> None:
    disk = _open(tmp_path, budget=_size(tmp_path) + 1000)
    _save(disk, _one(1), made_up(varied_tokens(400)))
    assert disk.holds(_one(1).tokens) and len(disk._texts) == 1


def test_other_pairs_make_room_if_they_were_not_used_for_longer(tmp_path: Path) -> None:
    size = _size(tmp_path)
    other = _open(tmp_path / "all", "other")
    _save(other, _one(1), _one(2))
    other.close()
    disk = _open(tmp_path / "all", budget=int(3.5 * size))
    _save(disk, _one(3))
    assert other._folder.exists()
    _save(disk, _one(4))
    assert not other._folder.exists() and len(disk._texts) == 2
    disk.close()
    newer = _open(tmp_path / "all", "newer")
    _save(newer, _one(1))
    newer.close()
    disk = _open(tmp_path / "all", budget=int(3.5 * size))
    _save(disk, _one(5))
    assert [disk.holds(_one(seed).tokens) for seed in (3, 4, 5)] == [False, True, True] and newer._folder.exists()
    used = _open(tmp_path / "all", "used")
    _save(used, _one(1), _one(2))
    disk.close()
    disk = _open(tmp_path / "all", budget=int(2.5 * size))
    _save(disk, _one(6))
    assert len(disk._texts) == 2 and not newer._folder.exists() and len(used._texts) == 2 and used._folder.exists(), (
        "a process uses it"
    )
    assert _load(used, _one(1).tokens)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_what_is_loaded_is_what_was_saved(tmp_path: Path, seed: int) -> None:
    rng, snapshots = random.Random(seed), dict[tuple[int, ...], Snapshot]()
    disk = _open(tmp_path, budget=40_000)
    for _ in range(60):
        action = rng.random()
        if action < 0.35:
            base = rng.choice([None, *snapshots.values()])
            base = base if base and base.length < 250 else None
            tokens = (base.tokens if base else []) + varied_tokens(rng.randint(1, 60), seed=rng.randrange(50))
            snapshots[tuple(tokens)] = made_up(tokens, base)
            _save(disk, snapshots[tuple(tokens)])
        elif action < 0.75 and snapshots:
            known = rng.choice(list(snapshots.values()))
            loaded = _load(disk, known.tokens)
            assert loaded is None or loaded.tokens == known.tokens
            if loaded:
                assert _bytes(_with(loaded, parts=())) == _bytes(_with(known, parts=()))
                snapshots[tuple(known.tokens)] = loaded
        elif action < 0.9:
            disk.close()
            if rng.random() < 0.5 and (files := _files(tmp_path)):
                fault, share = rng.choice(FAULTS)
                fault(rng.choice(files), share)
            disk = _open(tmp_path, budget=rng.choice((20_000, 40_000)))
        _assert_tidy(tmp_path, disk)
        assert disk.nbytes <= disk.budget


# --------------------------------------------------------------------------- pairs


def _pair(name: str, bits: int | None = None) -> Pair:
    return Pair(*pair_of(name), PROGRAMS, bits)


def _prefixes(folder: Path, pair: Pair, budget: int = PLENTY, every: int = 4096) -> Prefixes:
    return Prefixes(pair, budget, every, near=1, store=_open(folder))


RULES = Rules(FORCED, drafts="argmax")


def _read(prefixes: Prefixes, prompt: list[int], marks: tuple[int, ...] = ()) -> int:
    with prefixes.open(prompt, RULES) as text:
        list(text.read(64, marks))
        return text.cached


@few_cases
def test_a_prompt_loaded_from_disk_is_one_that_was_read(tmp_path: Path, name: str, bits: int | None) -> None:
    """Below and above the window; to the bit, drafts included, as when it is read in the same pieces."""
    pair, cuts = _pair(name, bits), (12, 260)
    prefixes = _prefixes(tmp_path, pair)
    with prefixes.open(TEXT[: cuts[-1] + 1], RULES) as text:
        list(text.read(2048, cuts))
    prefixes.close()
    for cut in cuts:
        prefixes = _prefixes(tmp_path, pair)
        with prefixes.open(TEXT[: cut + 1], RULES) as text:
            assert text.cached == cut == text.sequence.cache.position.item()
            source = _begun_in_pieces(name, [c for c in cuts if c <= cut], bits)
            assert text.sequence.ready == source.ready
            more = TEXT[cut + 1 : cut + 6]
            _assert_same(_goes_on(text.sequence, more), _goes_on(source, more), 0.0)
        assert prefixes.usage.disk_hits == 1 and prefixes.usage.disk_discarded == 0
        prefixes.close()


def _begun_in_pieces(name: str, cuts: list[int], bits: int | None) -> Sequence:
    sequence = _begun(name, cuts[0], bits)
    for begin, end in pairwise(cuts):
        sequence.prefill(TEXT[begin + 1 : end + 1], 2048, lambda done, total: None)
    return sequence


@few_cases
def test_a_reply_loaded_from_disk_goes_on_as_if_it_had_not_ended(tmp_path: Path, name: str, bits: int | None) -> None:
    """The drafter's state is there: its next drafts are those it would have made."""
    pair, prefixes = _pair(name, bits), _prefixes(tmp_path, _pair(name, bits))
    drafts = min(3, pair.drafter.limit)
    with prefixes.open(TEXT[:31], RULES) as text:
        list(text.read(64))
        for k in (0, drafts, drafts):
            text.sequence.round(k)
        source = text.sequence
    ready, said = source.ready, source.text
    prefixes.close()
    prefixes = _prefixes(tmp_path, pair)
    with prefixes.open(said, RULES) as text:
        if " " in name:  # what a draft model has not read is not kept on disk, so the prompt's end is found
            assert text.cached == 30 and prefixes.usage.disk_discarded == 0
            return
        assert text.cached == len(said) - 1 and text.sequence.ready == ready
        for _ in range(3):
            mine, theirs = text.sequence.round(drafts), source.round(drafts)
            assert (mine.tokens, mine.accepted, mine.drafted) == (theirs.tokens, theirs.accepted, theirs.drafted)
            assert gap(mine.logprobs, theirs.logprobs) == 0


@few_cases
def test_shapes_are_told_without_reading(name: str, bits: int | None) -> None:
    pair = _pair(name, bits)
    blank(pair, 100_000)
    for length in (1, 2, 17, 257):
        sequence = Sequence(pair, RULES)
        sequence.prefill(TEXT[: length + 1], 2048, lambda done, total: None)
        snapshot = take(sequence)
        before = mx.get_active_memory()
        told = blank(pair, length)
        assert snapshot.is_like(told) and not snapshot.is_like(blank(pair, length + 1))
        assert mx.get_active_memory() - before < 2**16, "nothing is computed"


def test_a_conversation_goes_on_after_a_restart_and_its_parts_are_written_once(tmp_path: Path) -> None:
    pair = _pair("qwen3_5_tied")
    turns = (60, 130, 200)
    for turn, cached in zip(turns, (0, 59, 129), strict=True):
        prefixes = _prefixes(tmp_path, pair)
        assert _read(prefixes, TEXT[:turn]) == cached
        assert prefixes.usage.disk_hits == (cached > 0)
        prefixes.close()
    disk = _open(tmp_path)
    assert sorted(len(text.pieces) for text in disk._texts.values()) == [1, 2, 3]
    assert len({piece.file for text in disk._texts.values() for piece in text.pieces}) == 3


def test_writing_waits_until_it_is_told_and_goes_on_slice_by_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "SLICE", 4096)
    prefixes = _prefixes(tmp_path, _pair("gemma4_keqv"))
    assert not prefixes.flush(1.0), "there is nothing yet"
    _read(prefixes, TEXT[:40])
    _read(prefixes, varied_tokens(60, seed=4))
    assert not _files(tmp_path)
    flushes = 1
    while prefixes.flush(0.0):
        flushes += 1
        assert len([path for path in _files(tmp_path) if path.suffix == TEMPORARY]) <= 1
    assert flushes > 6 and not prefixes.flush(0.0)
    assert [len(text.tokens) for text in _disk(prefixes)._texts.values()] == [59, 39], "the newest first"
    assert prefixes.usage.disk_nbytes == sum(path.stat().st_size for path in _files(tmp_path))


def _disk(prefixes: Prefixes) -> Store:
    assert prefixes._disk is not None
    return prefixes._disk


def test_waypoints_are_written_once_they_were_of_use(tmp_path: Path) -> None:
    prefixes = _prefixes(tmp_path, _pair("gemma4_keqv"), every=20)
    _read(prefixes, TEXT[:71], marks=(33,))
    prefixes.flush(10)
    assert sorted(text.length for text in _disk(prefixes)._texts.values()) == [33, 70]
    _read(prefixes, [*TEXT[:40], 5, 6])
    prefixes.flush(10)
    assert sorted(text.length for text in _disk(prefixes)._texts.values()) == [33, 40, 41, 70]


def test_what_is_evicted_while_it_is_written_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SLICE", 4096)
    pair = _pair("gemma4_keqv")
    trial = Prefixes(pair, PLENTY)
    _read(trial, TEXT[:101])
    prefixes = _prefixes(tmp_path, pair, budget=int(trial.nbytes * 1.5))
    _read(prefixes, TEXT[:101])
    assert prefixes.flush(0.0) and prefixes._write is not None
    _read(prefixes, varied_tokens(101, seed=1))
    assert prefixes._write is None and not _files(tmp_path)
    prefixes.close()
    disk = _open(tmp_path)
    assert disk.holds(varied_tokens(101, seed=1)[:-1]) and len(disk._texts) == 1


def test_what_was_loaded_counts_as_what_was_read(tmp_path: Path) -> None:
    """Parts that two loaded texts share are in memory once, and the budget holds."""
    pair = _pair("qwen3_5_tied")
    prefixes = _prefixes(tmp_path, pair)
    for turn in (101, 171, 241):
        _read(prefixes, TEXT[:turn])
    before = prefixes.nbytes
    prefixes.close()
    again = _prefixes(tmp_path, pair)
    assert [_read(again, [*TEXT[:turn], 1]) for turn in (100, 170, 240)] == [100, 170, 240]
    assert again.nbytes == before and len(again._entries) == 3 and again.usage.disk_hits == 3
    held = dict[str, mx.array](tree_flatten([[p.rows for p in e.snapshot.parts] for e in again._entries]))
    whole = sum(entry.snapshot.own_nbytes for entry in again._entries)
    assert sum({id(array): array.nbytes for array in held.values()}.values()) + whole == before
    assert [_read(again, [*TEXT[:turn], 1]) for turn in (100, 170, 240)] == [100, 170, 240]
    assert again.usage.disk_hits == 3, "they are in memory now"
    again.close()
    none = _prefixes(tmp_path, pair, budget=10)
    assert _read(none, [*TEXT[:240], 1]) == 240, "one text alone goes on from it"
    assert none.nbytes == 0 and none.usage.disk_hits == 1


def test_the_budget_of_memory_holds_for_what_is_loaded(tmp_path: Path) -> None:
    pair = _pair("gemma4_keqv")
    prefixes, texts = _prefixes(tmp_path, pair), [varied_tokens(101, seed=seed) for seed in range(3)]
    _read(prefixes, texts[0])
    budget = int(2.5 * prefixes.nbytes)
    for text in texts[1:]:
        _read(prefixes, text)
    prefixes.close()
    small = _prefixes(tmp_path, pair, budget=budget)
    for text in (*texts, texts[0]):
        assert _read(small, text) == 100 and small.nbytes <= budget
    assert small.usage.evicted == 2 and small.usage.disk_hits == 4 and len(small._entries) == 2


def test_the_disk_is_asked_only_for_what_saves_enough(tmp_path: Path) -> None:
    pair = _pair("gemma4_keqv")
    prefixes = _prefixes(tmp_path, pair)
    _read(prefixes, TEXT[:101])
    prefixes.close()
    prefixes = Prefixes(pair, PLENTY, near=10, store=_open(tmp_path))
    _read(prefixes, TEXT[:61], marks=(40,))  # a text that the one on disk goes on from
    assert _read(prefixes, TEXT[:120]) == 100
    assert prefixes.usage.disk_hits == 1
    prefixes.close()
    prefixes = Prefixes(pair, PLENTY, near=26, store=_open(tmp_path))
    assert _read(prefixes, [*TEXT[:100], 3]) == 0 and prefixes.usage.disk_hits == 0


def test_what_is_used_in_memory_is_used_on_disk(tmp_path: Path) -> None:
    prefixes = _prefixes(tmp_path, _pair("gemma4_keqv"))
    for text in (TEXT[:50], varied_tokens(60, seed=1)):
        _read(prefixes, text)
        prefixes.flush(10)
    _read(prefixes, TEXT[:50])
    prefixes.close()
    assert [text.length for text in _open(tmp_path)._texts.values()] == [59, 49]


def test_where_a_text_leaves_one_on_disk_is_stored(tmp_path: Path) -> None:
    pair = _pair("gemma4_keqv")
    prefixes = _prefixes(tmp_path, pair)
    _read(prefixes, TEXT[:101])
    prefixes.close()
    prefixes = _prefixes(tmp_path, pair)
    assert _read(prefixes, [*TEXT[:80], *varied_tokens(9, seed=3)]) == 0
    assert _read(prefixes, [*TEXT[:80], 4]) == 80


def test_a_damaged_text_is_read_anew(tmp_path: Path, warnings: Warnings) -> None:
    pair = _pair("qwen3_5_tied")
    prefixes = _prefixes(tmp_path, pair)
    for turn in (51, 121):
        _read(prefixes, TEXT[:turn])
    prefixes.close()
    prefixes = _prefixes(tmp_path, pair)
    longest = max(_disk(prefixes)._texts.values(), key=lambda text: text.length)
    _flip(_disk(prefixes)._folder / longest.own, 0.9)
    assert _read(prefixes, [*TEXT[:120], 1]) == 50, "the one before it is there"
    assert len(warnings()) == 1 and prefixes.usage.disk_discarded == 1
    prefixes.close()
    assert _read(_prefixes(tmp_path, pair), [*TEXT[:120], 1]) == 120


# --------------------------------------------------------------------------- whose numbers they are


def test_a_pair_is_known_again_and_no_other_is_taken_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "gemma4_keqv", folder)
    name, drafter = str(folder), str(folder / "assistant")
    same = identity(load_pair(name, drafter))
    assert same == identity(load_pair(name, drafter))
    others = [
        identity(load_pair(name, drafter, kv_bits=8)),
        identity(load_pair(name, drafter, dtype=mx.float32)),
        identity(load_pair(name, drafter, drafter_bits=8)),
        identity(load_pair(name, None)),
        identity(load_pair(str(FIXTURES / "gemma4_ple"), str(FIXTURES / "gemma4_ple" / "assistant"))),
    ]
    for changed in (folder / "config.json", folder / "assistant" / "config.json"):
        changed.write_text(json.dumps(json.loads(changed.read_text()) | {"note": 1}))
        others.append(identity(load_pair(name, drafter)))
    for weights in [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("assistant/*.safetensors"))]:
        times = weights.stat()
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
        others.append(identity(load_pair(name, drafter)))
        _flip(weights, 1.0)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
        others.append(identity(load_pair(name, drafter)))
    assert len({same, *others}) == 1 + len(others)


@pytest.mark.parametrize("name", ["demo", "demo-qwen"])
def test_demos_have_an_identity(name: str) -> None:
    loaded = load_pair(name)
    assert len(identity(loaded)) == 64 and identity(loaded) == identity(load_pair(name))
    assert len(loaded.places) == 2 and len(loaded.networks) == 2
