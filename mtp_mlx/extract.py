"""The mtp head of an original checkpoint, in a small file of its own: of the original only its bytes are read.

For a converted target that lost its head: the file lies beside the target's weights and is found there.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mtp_mlx.checkpoint import INDEX, Checkpoint, Header, TensorEntry, read_header, read_json, text_part
from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.hub import TENSORS, Remote, local
from mtp_mlx.loading import has_own_head, head_names, refuse_headless, sidecar_name, stored_raw, unfused_head
from mtp_mlx.quantise import Affine, quantised

AT_ONCE = 16 << 20  # bytes of a request: what an interruption can cost

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes so far, of all


class Source(Protocol):
    """A checkpoint of which parts can be read."""

    @property
    def files(self) -> Mapping[str, int]:
        """Name -> bytes."""

    def read(self, file: str, begin: int, end: int) -> bytes: ...

    def json(self, file: str) -> dict[str, Any]: ...

    def header(self, file: str) -> Header: ...


@dataclass(frozen=True)
class Folder:
    """A checkpoint on disk, as a source of parts."""

    path: Path

    @property
    def files(self) -> Mapping[str, int]:
        return {file.name: file.stat().st_size for file in sorted(self.path.iterdir()) if file.is_file()}

    def read(self, file: str, begin: int, end: int) -> bytes:
        with (self.path / file).open("rb") as opened:
            opened.seek(begin)
            return opened.read(end - begin)

    def json(self, file: str) -> dict[str, Any]:
        return read_json(self.path / file)

    def header(self, file: str) -> Header:
        return read_header(self.path / file)


class Piece(NamedTuple):
    """One tensor of a head, where it is now."""

    name: str  # below `mtp.`
    file: str
    entry: TensorEntry


class Span(NamedTuple):
    """Bytes of a file that are read in one go."""

    file: str
    begin: int
    end: int


@dataclass(frozen=True)
class Head:
    """What has to be read of a source, in the order in which it stands there."""

    name: str  # of the source, for people
    origin: str | None  # what a partial file must come from to be continued; None if copying again is as good
    pieces: tuple[Piece, ...]
    format: str | None  # how its norms are stored is decided by this

    @property
    def nbytes(self) -> int:
        return sum(piece.entry.end - piece.entry.begin for piece in self.pieces)

    @property
    def preamble(self) -> bytes:
        """What stands before the tensors in the new file."""
        metadata = {"format": self.format, "source": self.origin}
        content: dict[str, Any] = {"__metadata__": {key: value for key, value in metadata.items() if value}}
        offset = 0
        for name, _, entry in self.pieces:
            end = offset + entry.end - entry.begin
            content[f"mtp.{name}"] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def spans(self) -> list[Span]:
        """The bytes to read; tensors that stand side by side are read together."""
        found: list[Span] = []
        for _, file, entry in self.pieces:
            if found and found[-1].file == file and found[-1].end == entry.begin:
                found[-1] = found[-1]._replace(end=entry.end)
            else:
                found.append(Span(file, entry.begin, entry.end))
        return found

    def spans_after(self, done: int) -> Iterator[Span]:
        """What is left once the first `done` bytes have been read, in requests of a limited size."""
        for span in self.spans():
            skipped = min(done, span.end - span.begin)
            done -= skipped
            for begin in range(span.begin + skipped, span.end, AT_ONCE):
                yield Span(span.file, begin, min(begin + AT_ONCE, span.end))


class Extracted(NamedTuple):
    """What was written."""

    file: Path
    tensors: int
    nbytes: int
    original: int  # bytes of the source's weights
    found_beside: bool  # whether the target in that folder finds it by itself


def extract(
    name: str,
    output: Path,
    *,
    how: Affine | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Extracted:
    """Write the mtp head of a checkpoint (folder, weight file or hub id) into a file, or a converted target's folder.

    What was read before an interruption lies in `<output>.partial` and is not read again. Raises CheckpointError for
    a source without a head that can be used, or a disk that is full; RequestError for an output that is in the way.
    """
    file = _output_file(output, force)
    source, head = open_head(name)
    if file.parent.joinpath("config.json").is_file():
        _check_place(source, name, Checkpoint.open(file.parent))
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _check_space(head, file.parent, partial, how)
        _fetch(source, head, partial, progress)
        if how is None:
            partial.replace(file)
        else:
            _quantise(partial, file, how)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error.strerror or error}") from error
    given = Path(name).name if Path(name).is_file() else None
    weights = sum(n for other, n in source.files.items() if other.endswith(TENSORS) and given in (None, other))
    beside = file.parent.joinpath("config.json").is_file()
    return Extracted(file, len(head.pieces), file.stat().st_size, weights, beside)


def open_head(name: str) -> tuple[Source, Head]:
    """A checkpoint and where its mtp head is. Raises CheckpointError for one without a head that can be used."""
    source, given, origin = open_source(name)
    if given is None:
        if "config.json" not in source.files:
            raise CheckpointError(f"{name} has no config.json; give the original checkpoint, a folder or a hub id")
        refuse_headless(source.json("config.json"), name)
    headers = _headers_with_head(source, name) if given is None else {given: source.header(given)}
    pieces = sorted(
        (
            Piece(below, file, header.tensors[tensor])
            for file, header in headers.items()
            for tensor, below in head_names(header.names).items()
        ),
        key=lambda piece: (piece.file, piece.entry.begin),
    )
    if not pieces:
        raise CheckpointError(f"{name} holds no tensors mtp.*; give the original, not a conversion that left them out")
    _check_kinds(pieces, name)
    return source, Head(name, origin, tuple(pieces), _format(source, headers))


def open_source(name: str) -> tuple[Source, str | None, str | None]:
    """A source of parts, the one file of it that is meant, and what it is called to know it again.

    Raises CheckpointError for a name of nothing.
    """
    path = local(name)
    if path is None:
        remote = Remote.open(name)
        return remote, None, f"{remote.repo}@{remote.commit}"
    if path.is_dir():
        return Folder(path), None, None
    if path.is_file() and path.name.endswith(TENSORS):
        return Folder(path.parent), path.name, None
    raise CheckpointError(f"{name} is neither a folder, nor a weight file, nor a hub id; give one of them")


def _headers_with_head(source: Source, name: str) -> dict[str, Header]:
    """The weight files that hold a head: those the index names, otherwise whichever do."""
    weights = _weights(source)
    if INDEX in source.files:
        places = source.json(INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{INDEX} in {name} has no weight_map; the download is damaged")
        found = sorted({str(places[tensor]) for tensor in head_names(places)})
        missing = [file for file in found if file not in weights]
        if missing:
            raise CheckpointError(f"{name} lacks {missing[0]}, which its index names; download it again")
        if found:
            return {file: source.header(file) for file in found}
        weights = [file for file in weights if file not in places.values()]
    headers = {file: source.header(file) for file in weights}
    return {file: header for file, header in headers.items() if head_names(header.names)}


def _check_kinds(pieces: list[Piece], name: str) -> None:
    """Raises CheckpointError for a head that is quantised in a way its tensors alone do not tell."""
    names = {piece.name for piece in pieces}
    blocks = next((piece for piece in pieces if piece.entry.dtype.startswith("F8") or "scale_inv" in piece.name), None)
    if blocks:
        raise CheckpointError(
            f"the head in {name} is in block-scaled FP8 (mtp.{blocks.name}), which is not read; "
            "use the original in bfloat16"
        )
    for tensor, _, entry in pieces:
        packed = entry.dtype == "U32" and {f"{tensor.removesuffix('weight')}{part}" for part in ("scales", "biases")}
        if entry.dtype not in ("BF16", "F16", "F32") and not (packed and packed <= names):
            raise CheckpointError(
                f"the head in {name} is quantised (mtp.{tensor} is {entry.dtype}) in a way that its tensors do not "
                "tell; use the original in bfloat16"
            )


def _format(source: Source, headers: Mapping[str, Header]) -> str | None:
    """What the new file's header is to say of its format, so that it is read as the source would be.

    "pt" means that norms are differences from 1. Where a source does not say, the layout of the target's tensors
    does; those do not come along, so it has to be written down.
    """
    formats = {header.format for header in headers.values()}
    if "pt" in formats:
        return "pt"
    for file in [*headers, *(other for other in _weights(source) if other not in headers)]:
        raw = stored_raw((headers.get(file) or source.header(file)).tensors)
        if raw is not None:
            return "pt" if raw else "mlx"
    return formats.pop() if len(formats) == 1 else None


def _weights(source: Source) -> list[str]:
    return [file for file in source.files if file.endswith(TENSORS) and "/" not in file]


def _output_file(output: Path, force: bool) -> Path:
    """Raises RequestError for a place where nothing can or should be written."""
    if output.is_dir():
        beside = output / "config.json"
        file = output / sidecar_name(read_json(beside) if beside.is_file() else {})
    elif output.name.endswith(TENSORS):
        file = output
    else:
        raise RequestError(f"--output {output} is neither a folder that exists nor a file that ends in {TENSORS}")
    if file.is_dir() or (file.exists() and not force):
        raise RequestError(f"{file} is there already; give another --output, or --force to replace it")
    return file


def _check_place(source: Source, name: str, target: Checkpoint) -> None:
    """Raises CheckpointError where a head would lie beside a target that has no use for it."""
    if not has_own_head(target.config):
        raise CheckpointError(f"{target.folder} has model_type {target.model_type!r}, which takes no mtp head")
    if head_names(target.names()):
        raise CheckpointError(f"{target.folder} holds an mtp head already, inside its own weights; nothing to do")
    if "config.json" in source.files:
        check_fits(source.json("config.json"), name, target)


def check_fits(config: Mapping[str, Any], name: str, target: Checkpoint) -> None:
    """Raises CheckpointError where a head's config is not that of the target."""
    theirs, ours = text_part(config), text_part(target.config)
    for key in ("hidden_size", "vocab_size", "num_experts"):
        if theirs.get(key) != ours.get(key):
            raise CheckpointError(
                f"the head in {name} belongs to another target: {key} {theirs.get(key)}, {target.folder} has "
                f"{ours.get(key)}; use the original that this target was converted from"
            )


def _check_space(head: Head, folder: Path, partial: Path, how: Affine | None) -> None:
    have = shutil.disk_usage(folder).free + (partial.stat().st_size if partial.is_file() else 0)
    need = head.nbytes + len(head.preamble)
    need += 0 if how is None else need * how.bits // 16 * 5 // 4  # scales and biases are a quarter at most
    if need > have:
        raise CheckpointError(f"{folder} has {have / 1e9:.2f} GB free, the head needs {need / 1e9:.2f} GB; make room")


def _fetch(source: Source, head: Head, partial: Path, progress: Progress) -> None:
    """Fill the partial file, from where an earlier attempt at the same head ended."""
    preamble, total = head.preamble, head.nbytes
    done = _begun(head, partial)
    with partial.open("r+b" if done else "wb") as file:
        if not done:
            file.write(preamble)
        file.seek(len(preamble) + done)
        for span in head.spans_after(done):
            progress(done, total)
            content = source.read(*span)
            if len(content) != span.end - span.begin:
                raise CheckpointError(
                    f"{span.file} of {head.name} gave {len(content)} bytes of {span.end - span.begin}; try again"
                )
            file.write(content)
            file.flush()  # so that an interruption costs one request
            done += len(content)
        file.truncate()
    progress(done, total)


def _begun(head: Head, partial: Path) -> int:
    """Bytes of the head that are there already. Another head's are thrown away, with a notice."""
    if not partial.is_file() or not partial.stat().st_size:
        return 0
    with partial.open("rb") as file:
        same = head.origin is not None and file.read(len(head.preamble)) == head.preamble
    if same:
        return min(partial.stat().st_size - len(head.preamble), head.nbytes)
    if head.origin is not None:
        _log.warning("%s comes from another source, commit or attempt; starting anew", partial)
    return 0


def _quantise(partial: Path, file: Path, how: Affine) -> None:
    """Norms stay as they were stored, and so does what tells how."""
    loaded = mx.load(str(partial), format="safetensors")
    assert isinstance(loaded, dict)
    form = read_header(partial).format
    try:
        tensors = unfused_head({name.removeprefix("mtp."): array for name, array in loaded.items()})
    except ValueError as error:
        raise CheckpointError(f"the head in {partial} is incomplete: {error}") from error
    if any(array.dtype == mx.uint32 for array in tensors.values()):
        raise RequestError("the head is quantised already; leave --bits out to take it as it is")
    small = quantised(tensors, how, "the head")
    # In a folder of its own: a weight file half-written beside a target's would be read as one of them.
    with tempfile.TemporaryDirectory(prefix=".mtp-", dir=file.parent) as folder:
        written = Path(folder) / file.name
        try:
            mx.save_safetensors(
                str(written), {f"mtp.{name}": array for name, array in small.items()}, {"format": form or "mlx"}
            )
        except RuntimeError as error:
            raise CheckpointError(f"{file} cannot be written: {error}") from error
        written.replace(file)
    partial.unlink()
