"""What a snapshot on disk consists of: its text, and the files that hold the rest."""

import hashlib
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mtp_mlx.sealing import RECORD, DamagedError, read_record, write_record

FORMAT = 1  # to be raised where files are laid out differently, or where a pair computes other numbers than before


class Piece(NamedTuple):
    """A part of a snapshot's rows."""

    start: int
    file: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """One stored text."""

    tokens: "array[int]"
    ready: bool  # whether the drafter has been told of the last token
    pieces: tuple[Piece, ...]
    own: str  # the file of what it shares with no other

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def name(self) -> str:
        """There is one for each text."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest() + RECORD

    @property
    def files(self) -> set[str]:
        return {self.own, *(piece.file for piece in self.pieces)}

    @staticmethod
    def size(tokens: Iterable[int], pieces: int) -> int:
        """Bytes that one takes, or a few more."""
        return 350 + 90 * pieces + sum(len(str(token)) + 1 for token in tokens)

    def write(self, folder: Path, identity: str) -> None:
        """Raises OSError."""
        content = {"format": FORMAT, "identity": identity, "tokens": self.tokens.tolist(), "ready": self.ready}
        write_record(folder / self.name, content | {"pieces": self.pieces, "own": self.own})

    @classmethod
    def read(cls, path: Path, identity: str) -> "Manifest":
        """Raises DamagedError for anything that this program has not written for this pair, or OSError."""
        content = read_record(path)
        try:
            if content["format"] != FORMAT or content["identity"] != identity:
                raise DamagedError(path.name, "was written for another pair, or by another version")
            manifest = cls(
                array("i", content["tokens"]),
                bool(content["ready"]),
                tuple(Piece(int(start), _file(file)) for start, file in content["pieces"]),
                _file(content["own"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(path.name, f"is not understood: {error!r}") from error
        if not manifest.tokens or min(manifest.tokens) < 0 or manifest.name != path.name:
            raise DamagedError(path.name, "is of another text")
        return manifest


def _file(name: Any) -> str:
    """A file beside the manifest, and nowhere else."""
    if not re.fullmatch(r"[0-9a-f]{64}\.safetensors", name):
        raise ValueError(f"{name!r} is no name of ours")
    return str(name)
