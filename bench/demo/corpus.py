"""The text the demo models learn from: CPython's library and documentation, and SymPy, split by file.

The corpus knows archives and files, not tokens, so any model family can train on it.
"""

import argparse
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HELDOUT_PERCENT = 2
LARGEST_FILE = 400_000  # characters; larger sources in these packages are generated tables


@dataclass(frozen=True)
class Package:
    """One source archive and which of its files count."""

    name: str
    version: str
    licence: str
    archive: str  # file name pattern inside the folder of archives
    keep: str  # regular expression on the path inside the archive, without its top folder


@dataclass(frozen=True)
class Document:
    """One file of the corpus."""

    package: str
    path: str
    kind: str  # "code" or "text"
    heldout: bool
    text: str


PACKAGES = (
    Package(
        name="CPython",
        version="3.11.2",
        licence="PSF-2.0",
        archive="*ython*3.11.2*.t*gz",
        keep=r"(Lib/.*\.py|Doc/.*\.rst)$",
    ),
    Package(
        name="SymPy",
        version="1.14.0",
        licence="BSD-3-Clause",
        archive="sympy-1.14.0.tar.gz",
        keep=r"(sympy/.*\.py|doc/src/.*\.(rst|md))$",
    ),
)

# Tests, data tables and generated parsers teach a small model nothing but noise.
SKIP = re.compile(
    r"(^|/)(tests?|idle_test|benchmarks|encodings|pydoc_data|_antlr|_generated|ensurepip)/"
    r"|whatsnew/changelog|html/entities\.py|resolvent_lookup|_sysconfigdata"
)


def is_heldout(path: str) -> bool:
    """Whether a file is never trained on; depends on its path alone, so a rerun splits alike."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def is_table(text: str) -> bool:
    """Whether a file is mostly numbers or very long lines."""
    digits = sum(c.isdigit() for c in text)
    return digits > 0.12 * len(text) or len(text) > 110 * (text.count("\n") + 1)


def read_package(package: Package, folder: Path) -> Iterator[Document]:
    """Yield the package's files in path order."""
    archive = next(iter(sorted(folder.glob(package.archive))), None)
    if archive is None:
        raise SystemExit(f"{package.name} {package.version}: no file matches {package.archive} in {folder}")
    found: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if not member.isfile() or not re.match(package.keep, path) or SKIP.search(path):
                continue
            stream = tar.extractfile(member)
            assert stream is not None
            found[path] = stream.read().decode("utf-8", errors="replace")
    for path, text in sorted(found.items()):
        if 200 <= len(text) <= LARGEST_FILE and not is_table(text):
            kind = "code" if path.endswith(".py") else "text"
            yield Document(package.name, path, kind, is_heldout(f"{package.name}/{path}"), text)


def write_corpus(archives: Path, out: Path) -> None:
    """Write corpus.jsonl, one document a line, and corpus.json with the counts."""
    documents = [document for package in PACKAGES for document in read_package(package, archives)]
    with (out / "corpus.jsonl").open("w") as file:
        for document in documents:
            file.write(json.dumps(asdict(document)) + "\n")
    counts = []
    for package in PACKAGES:
        for kind in ("code", "text"):
            mine = [d for d in documents if d.package == package.name and d.kind == kind]
            counts.append(
                {
                    "package": package.name,
                    "version": package.version,
                    "licence": package.licence,
                    "kind": kind,
                    "files": len(mine),
                    "train_bytes": sum(len(d.text.encode()) for d in mine if not d.heldout),
                    "heldout_files": sum(d.heldout for d in mine),
                    "heldout_bytes": sum(len(d.text.encode()) for d in mine if d.heldout),
                }
            )
    (out / "corpus.json").write_text(json.dumps(counts, indent=1) + "\n")
    for row in counts:
        print(row)


def load_corpus(out: Path) -> list[Document]:
    """Read what write_corpus wrote."""
    with (out / "corpus.jsonl").open() as file:
        return [Document(**json.loads(line)) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archives", type=Path, required=True, help="folder with the source archives")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_corpus(args.archives, args.out)


if __name__ == "__main__":
    main()
