"""A repository's folder without its weights: small files as they are, weight files with true headers and holes inside.

A hole takes no room on a disk, and the file is as long as the true one, so that everything which looks at a folder
looks at this one too. Only what decides how a drafter is read is fetched as well: a table of token ids, an mtp head's
norms.
"""

from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from mtp_mlx.checkpoint import Header, TensorEntry
from mtp_mlx.errors import CheckpointError
from mtp_mlx.hub import TENSORS, Remote
from mtp_mlx.models.base import HEAD_PREFIX, is_bare

_WANTED = ("*.json", "README.md", "*/config.json")
_NOT = ("tokenizer*", "vocab*", "merges*", "processor*", "preprocessor*")
_LONGEST_HEADER = 100_000_000  # the format's own limit
_LARGEST = 4_000_000  # bytes of a small file; the index of a large model may be longer


def hollow(repo: str, scratch: Path) -> Path:
    """The folder of a hub id, under `scratch`. Raises CheckpointError for a repository that cannot be read."""
    remote = Remote.open(repo)
    folder = scratch / remote.repo.replace("/", "--")
    for name, size in remote.files.items():
        if _is_plain(name) and name.endswith(TENSORS):
            _shell(remote, name, size, folder / name)
        elif _is_plain(name) and _is_wanted(name, size):
            _put(folder / name, remote.read(name, 0, size) if size else b"")
    return folder


def _is_plain(name: str) -> bool:
    """Whether a file lies in the folder or in one of its folders, and nowhere else."""
    parts = PurePosixPath(name).parts
    return len(parts) <= 2 and ".." not in parts and not name.startswith("/") and "\\" not in name


def _is_wanted(name: str, size: int) -> bool:
    if name.endswith("index.json"):
        return True
    return size <= _LARGEST and any(fnmatch(name, p) for p in _WANTED) and not any(fnmatch(name, p) for p in _NOT)


def _shell(remote: Remote, name: str, size: int, path: Path) -> None:
    """A weight file: its header, and holes."""
    start = remote.read(name, 0, min(8, size))
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):  # or all of the file would come
        raise CheckpointError(f"{name} of {remote.repo} is no safetensors file; report it to those who published it")
    text = remote.read(name, 8, 8 + length)
    _put(path, start + text)
    try:
        header = Header.parse(start, text)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} of {remote.repo} has a damaged header: {error}") from error
    with path.open("r+b") as file:
        file.truncate(size)
        for tensor, entry in header.tensors.items():
            if _decides(tensor, entry, header):
                file.seek(entry.begin)
                file.write(remote.read(name, entry.begin, entry.end))


def _decides(name: str, entry: TensorEntry, header: Header) -> bool:
    """Whether the values of a tensor say how a drafter is to be read."""
    if len(entry.shape) != 1:
        return False
    return entry.dtype in ("I32", "I64") or is_bare(header.names) or bool(HEAD_PREFIX.match(name))


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
