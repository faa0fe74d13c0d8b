"""Files that are there whole or not at all, and are read only as they were written: a hash says so of every one.

Each is written under a temporary name, handed to the disk and renamed. A file of tensors is safetensors and is called
by the hash of its bytes, so one with the same contents is never written twice; a record is JSON behind its hash.
"""

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from mtp_mlx.checkpoint import read_header
from mtp_mlx.errors import CheckpointError

SLICE = 2**24  # bytes that are written at a time
TENSORS, RECORD, TEMPORARY = ".safetensors", ".json", ".tmp"


class DamagedError(Exception):
    """A file is not what was written."""

    def __init__(self, file: str, what: str):
        super().__init__(f"{file} {what}")
        self.file = file


def write_tensors(folder: Path, tensors: Mapping[str, mx.array]) -> Generator[None, None, str]:
    """Write a file, a slice at a time; its name. Who stops asking leaves nothing behind. Raises OSError."""
    temporary, digest, waiting = folder / ("tensors" + TEMPORARY), hashlib.sha256(), 0
    try:
        with _create(temporary) as file:
            for piece in _pieces(tensors):
                file.write(piece)
                digest.update(piece)
                waiting += len(piece)
                if waiting >= SLICE:
                    _sync(file)  # now, so that the last slice need not wait for all of them
                    waiting = 0
                    yield
            _sync(file)
        name = digest.hexdigest() + TENSORS
        temporary.rename(folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return name


def size(tensors: Mapping[str, mx.array]) -> int:
    """Bytes of such a file."""
    return len(_header(tensors)) + sum(array.nbytes for array in tensors.values())


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read such a file. Raises DamagedError, or OSError where it cannot be read."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() + TENSORS != path.name:
            raise DamagedError(path.name, "is damaged or cut short")
    try:
        read_header(path)  # of a file that has the right hash and was not written by us: MLX trusts its numbers
        tensors = mx.load(str(path))
        mx.eval(tensors)
    except (CheckpointError, RuntimeError, ValueError) as error:
        raise DamagedError(path.name, f"cannot be read: {error}") from error
    assert isinstance(tensors, dict)
    return tensors


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON. Raises OSError."""
    text = json.dumps(content, separators=(",", ":")).encode()
    temporary = path.with_suffix(TEMPORARY)
    try:
        with _create(temporary) as file:
            file.write(_hash(text) + b"\n" + text)
            _sync(file)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path) -> Any:
    """The JSON in such a file. Raises DamagedError, or OSError where it cannot be read."""
    digest, _, text = path.read_bytes().partition(b"\n")
    if digest != _hash(text):
        raise DamagedError(path.name, "is damaged or cut short")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path.name, f"is no JSON: {error}") from error


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _create(path: Path) -> BinaryIO:
    """A new file that nobody else may read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _pieces(tensors: Mapping[str, mx.array]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, in no piece more than a slice."""
    yield _header(tensors)
    for array in tensors.values():
        if array.size:
            flat: Any = array.reshape(-1).view(mx.uint8)  # MLX's stub leaves out that it is a buffer
            numbers = memoryview(flat)
            for begin in range(0, len(numbers), SLICE):
                yield numbers[begin : begin + SLICE]


def _header(tensors: Mapping[str, mx.array]) -> bytes:
    entries, end = dict[str, Any](), 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": _DTYPES[array.dtype], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.bool_: "BOOL"}
_DTYPES |= {mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64"}
_DTYPES |= {mx.int8: "I8", mx.int16: "I16", mx.int32: "I32", mx.int64: "I64"}
