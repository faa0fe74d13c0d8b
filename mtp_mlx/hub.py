"""From a name to files: a folder as it is, a demo, or a hub id, downloaded whole or read from afar in parts.

What is complete in the local cache is used without asking the hub. Only files that are read are fetched: configuration,
tokenizer and safetensors; no pickles and no code ever reach the disk.
"""

import errno
import glob
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_session,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

from mtp_mlx.checkpoint import INDEX, Header, header_length, read_json, shard_names
from mtp_mlx.errors import CheckpointError, MTPError

DEMO = "demo"
DEMOS = {DEMO: Path(__file__).parent / "demo", "demo-qwen": Path(__file__).parent / "demo_qwen"}
TENSORS = ".safetensors"

Accept = Callable[[Path], object]

_PARTS = ("mtp", "optiq", "assistant")  # folders of a repository that hold a head or a drafter
_SMALL = ("*.json", "*.jinja", "*.model", "merges.txt", "README.md")  # the last says what a model was made from
_SIDECARS = ("model-mtp*" + TENSORS, "mtp*" + TENSORS)
_LARGEST_SMALL = 200_000_000  # bytes; the largest tokenizers have 35 million
_START = 2**16  # bytes of a weight file to read at first: nearly every header is shorter


class UnreachableError(CheckpointError):
    """The hub may not or cannot be asked; what is here may still do."""


def find(name: str, accept: Accept = lambda folder: None) -> Path:
    """The folder of a model given as folder, hub id or demo; what is not on disk yet is downloaded.

    `accept` is shown the folder of a download as soon as it holds the configuration, and may raise what speaks
    against the rest. Raises CheckpointError, in one line, for whatever keeps the files from being here.
    """
    place = local(name)
    if place is not None:
        return place
    held = Snapshot.held(name)
    if held is not None and held.files is not None and not held.missing():
        return held.folder
    try:
        return download(name, accept).folder
    except UnreachableError as error:
        return held_instead(name, error)  # complete, but downloaded by another program: the hub may have more


def held_instead(name: str, error: UnreachableError) -> Path:
    """What is complete here of a model about which the hub cannot be asked. Raises CheckpointError if it is not."""
    held = Snapshot.held(name)
    if held is None or held.missing():
        what = name if held is None else f"{_some(held.missing())} of {name}"
        raise CheckpointError(f"{what} is not in the local cache, and {error}") from error
    return held.folder


def local(name: str) -> Path | None:
    """The place on this machine that a name means, or None for a hub id."""
    if name in DEMOS:
        return DEMOS[name]
    if not name:
        raise CheckpointError(f"the name of a model is empty; give a folder, a hub id, {' or '.join(DEMOS)}")
    try:
        path = Path(name).expanduser()
        return path if path.exists() or not is_hub_id(name) else None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name[:200]} cannot be opened: {first_line(error)}") from error


def is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~")) and not name.endswith(TENSORS)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Snapshot:
    """What the local cache holds of a repository, at the commit of the last download."""

    repo: str
    folder: Path
    files: Mapping[str, int] | None  # name -> bytes of all that the hub has; None if another program downloaded it

    @classmethod
    def held(cls, repo: str) -> "Snapshot | None":
        """None if the cache has not even the configuration."""
        try:
            folder = Path(snapshot_download(repo, allow_patterns="config.json", local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
        try:
            listed = get_cached_repo_tree(repo)
        except CachedRepoTreeNotFoundError:
            return cls(repo, folder, None) if (folder / "config.json").is_file() else None
        return cls(repo, folder, {file.path: file.size for file in listed})

    def needed(self) -> dict[str, int | None]:
        """The files that are read, with their sizes where they are known.

        Raises CheckpointError where the repository does not have all that it names.
        """
        index = read_json(self.folder / INDEX) if (self.folder / INDEX).is_file() else None
        if self.files is None:
            present = [path.name for path in self.folder.iterdir()]
            return dict.fromkeys(["config.json", *shard_names(index, present, self.repo)])
        shards = shard_names(index, self.files, self.repo)
        absent = [name for name in shards if name not in self.files]
        if absent:
            raise CheckpointError(
                f"{self.repo} has no {absent[0]}, which its {INDEX} names; the repository is incomplete"
            )
        others = [name for name, size in self.files.items() if _is_small(name, size) or _is_sidecar(name)]
        return {name: self.files[name] for name in [*others, *shards]}

    def missing(self) -> list[str]:
        """The files that are read and not here in full length."""
        try:
            return [name for name, size in self.needed().items() if not _is_here(self.folder / name, size)]
        except CheckpointError:
            if self.files is not None:
                raise
            return ["the weights"]


def _is_small(name: str, size: int) -> bool:
    """Whether a file belongs to configuration or tokenizer."""
    folder, _, base = name.rpartition("/")
    if size > _LARGEST_SMALL or (folder and folder not in (*_PARTS, "additional_chat_templates")):
        return False
    return any(fnmatch(base, pattern) for pattern in _SMALL)


def _is_sidecar(name: str) -> bool:
    """Whether a file holds a head or a drafter, beside the model's own weights."""
    folder, _, base = name.rpartition("/")
    if folder in _PARTS:
        return base.endswith(TENSORS)
    return not folder and any(fnmatch(base, pattern) for pattern in _SIDECARS)


def _is_here(path: Path, size: int | None) -> bool:
    return path.is_file() and (size is None or path.stat().st_size == size)


@dataclass(frozen=True)
class Fetched:
    """What a download has brought."""

    folder: Path
    new: dict[str, int]  # name -> bytes of the files that were not here before
    nbytes: int  # of all files that are read


def download(repo: str, accept: Accept = lambda folder: None) -> Fetched:
    """Bring the newest commit of a repository here; files that are here already are kept.

    Raises UnreachableError where there is no way to the hub, CheckpointError for all else that can go wrong.
    """
    with _explained(repo):
        files = Remote.open(repo).files
        if not any(name.endswith(TENSORS) for name in files):
            kinds = sorted({Path(name).suffix for name in files} & {".gguf", ".bin", ".pt", ".pth", ".onnx", ".npz"})
            found = f", only {', '.join(kinds)}" if kinds else ""
            raise CheckpointError(f"{repo} has no safetensors{found}; only safetensors are read: use an MLX conversion")
        small = [glob.escape(name) for name, size in files.items() if _is_small(name, size)]
        before = Snapshot.held(repo)
        folder = Path(snapshot_download(repo, allow_patterns=small, tqdm_class=_Silent))
        accept(folder)
        snapshot = Snapshot(repo, folder, files)
        missing = {name: files[name] for name in snapshot.missing()}
        _check_space(repo, folder, sum(missing.values()))
        for name in missing:
            # In this thread, where Ctrl-C ends it at once, and one by one: a large file is fetched in parts as it is.
            damaged = (folder / name).exists()
            hf_hub_download(repo, name, revision=folder.name, force_download=damaged, tqdm_class=_Bar)
    needed = {name: size or 0 for name, size in snapshot.needed().items()}
    if before is None or before.folder != folder:
        missing = needed
    return Fetched(folder, missing, sum(needed.values()))


class _Silent(tqdm):
    """No bars: those of the small files would stay open, and be drawn once more into what comes after."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]


class _Bar(tqdm):
    """The bar of one file, called by the file's name instead of the end of its address."""

    def __init__(self, *arguments: Any, desc: str = "", **options: Any):
        super().__init__(*arguments, desc=desc.rpartition("/")[2], **options)  # type: ignore[no-untyped-call]


def _check_space(repo: str, folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise CheckpointError(
            f"{repo} needs {wanted / 1e9:.2f} GB more in {constants.HF_HUB_CACHE}, where {free / 1e9:.2f} GB are free; "
            "free some, or set HF_HOME to a folder on another disk"
        )


@dataclass(frozen=True)
class Remote:
    """A repository on the hub, at one commit, of which parts are read without downloading the rest."""

    repo: str
    commit: str
    files: dict[str, int]  # name -> bytes

    @classmethod
    def open(cls, repo: str) -> "Remote":
        """Raises CheckpointError for a repository that is not there or not open to the user."""
        with _explained(repo):
            info = HfApi().model_info(repo, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if info.sha is None:
            raise CheckpointError(f"{constants.ENDPOINT} names no commit of {repo}; is it a hub?")
        return cls(repo, info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []})

    def json(self, file: str) -> dict[str, Any]:
        """The object in a JSON file. Raises CheckpointError for anything else."""
        size = self._size(file)
        if size > _LARGEST_SMALL:
            raise CheckpointError(f"{file} of {self.repo} has {size} bytes, too many for a configuration")
        try:
            # Whole: the hub may send text compressed, and then a range would be one of the compressed bytes.
            content = json.loads(self._fetch(file, None, size))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} of {self.repo} cannot be read as JSON: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} of {self.repo} is a JSON {type(content).__name__}, expected an object")
        return content

    def header(self, file: str) -> Header:
        """What a weight file says of itself. Raises CheckpointError for a file that is damaged."""
        size = self._size(file)
        start = self.read(file, 0, min(_START, size))
        try:
            end = 8 + header_length(start[:8], size)
            text = start[8:end] + (self.read(file, len(start), end) if end > len(start) else b"")
            return Header.parse(start[:8], text, size)
        except ValueError as error:
            raise CheckpointError(f"{file} of {self.repo} is damaged: {error}") from error

    def read(self, file: str, begin: int, end: int) -> bytes:
        """Bytes begin .. end-1 of a file. Raises CheckpointError where the answer is anything else."""
        size = self._size(file)
        if not 0 <= begin <= end <= size:
            raise CheckpointError(f"{file} of {self.repo} has {size} bytes, and none at {begin} to {end}")
        return self._fetch(file, begin, end - begin) if begin < end else b""

    def _size(self, file: str) -> int:
        if file not in self.files:
            raise CheckpointError(f"{self.repo} has no file {file}")
        return self.files[file]

    def _fetch(self, file: str, begin: int | None, length: int) -> bytes:
        """`length` bytes from `begin` on, or the whole file; a broken connection is taken up again where it broke."""
        got = bytearray()
        with _explained(self.repo):
            while True:
                before = len(got)
                try:
                    self._receive(file, begin, length, got)
                    return bytes(got)
                except HTTPError as error:
                    if isinstance(error, HfHubHTTPError) or len(got) == before:
                        raise

    def _receive(self, file: str, begin: int | None, length: int, got: bytearray) -> None:
        """Add to `got` what is missing of it."""
        headers: dict[str, Any] = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if begin is None:
            got.clear()
        else:
            part = f"{begin + len(got)}-{begin + length - 1}"
            headers["Range"] = f"bytes={part}"
        url, timeout = hf_hub_url(self.repo, file, revision=self.commit), constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            if begin is not None and (
                answer.status_code != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {part}/")
            ):
                raise CheckpointError(
                    f"asked for bytes {part} of {file} of {self.repo}, the server sent others (status "
                    f"{answer.status_code}); a proxy may be in the way: download the model with mtp-mlx pull"
                )
            for chunk in answer.iter_bytes():
                got += chunk
                if len(got) > length:
                    break
        if len(got) != length:
            raise CheckpointError(f"{file} of {self.repo}: expected {length} bytes, the server sent another number")


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns what can go wrong between us, the hub and the disk into one line."""
    try:
        yield
    except MTPError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of hf_xet, written in Rust
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise _explain(repo, cause or error) from error


def _explain(repo: str, error: BaseException) -> CheckpointError:
    hub = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return UnreachableError("HF_HUB_OFFLINE forbids to ask the hub; unset it to download")
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{repo} is gated; accept the licence at https://huggingface.co/{repo} and log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{repo} is neither a folder here nor a model on the hub that is open to you; check the name, and if it is "
            "private log in with `hf auth login`"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401 and get_token() is None:
            return _explain(repo, RepositoryNotFoundError(str(error), response=error.response))
        if status in (401, 403):
            return CheckpointError(f"the hub refuses your token for {repo} ({status}); log in with `hf auth login`")
        if status in (408, 429) or status >= 500:
            return UnreachableError(f"the hub at {hub} cannot serve {repo} at present ({status}); try again later")
        return CheckpointError(f"the hub refuses a file of {repo}: {first_line(error)}")
    if isinstance(error, HTTPError | LocalEntryNotFoundError):
        return UnreachableError(f"the hub at {hub} does not answer ({first_line(error)}); check your connection")
    if isinstance(error, HFValidationError):
        return CheckpointError(f"{repo} is neither a folder here nor a name that the hub allows: {first_line(error)}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full: {repo} does not fit into {constants.HF_HUB_CACHE}; free some space, or set HF_HOME to "
            "a folder on another disk; the next run fetches only what is missing then"
        )
    return CheckpointError(
        f"{repo} could not be downloaded ({first_line(error)}); the same command fetches what is missing"
    )


def _some(names: list[str]) -> str:
    """'a', or 'a and 2 more'."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
