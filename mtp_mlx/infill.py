"""Prompts to fill in the middle, for vocabularies that have markers for it. Families are data, in `infill.toml`."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.errors import RequestError


@dataclass(frozen=True)
class Infill:
    """The markers of a vocabulary, as token ids. What is filled in ends at a token of `stops`."""

    prefix: int
    suffix: int
    middle: int
    repository: int | None
    file: int | None
    stops: frozenset[int]

    def prompt(
        self,
        tokenizer: TokenizerWrapper,
        prefix: str,
        suffix: str,
        extra: Sequence[tuple[str, str]] = (),
        *,
        repository: str = "project",
        path: str = "current",
    ) -> list[int]:
        """Token ids after which the model writes what belongs between `prefix` and `suffix`.

        `extra` are other files, each its path and its text; `repository` and `path` then name the whole and the file to
        be filled. Nothing in these texts is read as a marker. Raises RequestError for other files where the vocabulary
        has no markers for them.
        """
        ids = self._files(tokenizer, extra, repository, path) if extra else []
        ids += [self.prefix, *plain(tokenizer, prefix), self.suffix, *plain(tokenizer, suffix), self.middle]
        return ids

    def _files(
        self, tokenizer: TokenizerWrapper, extra: Sequence[tuple[str, str]], repository: str, path: str
    ) -> list[int]:
        if self.repository is None or self.file is None:
            raise RequestError("this model has no tokens to mark up other files; leave them out")
        ids = [self.repository, *plain(tokenizer, f"{repository}\n")]
        for name, text in extra:
            ids += [self.file, *plain(tokenizer, f"{name}\n{text}" + ("" if text.endswith("\n") else "\n"))]
        return [*ids, self.file, *plain(tokenizer, f"{path}\n")]


def find_infill(vocabulary: Mapping[str, int]) -> Infill | None:
    """How to fill in the middle by the markers in a vocabulary (text -> id); None where it has none."""
    for family in _families():
        if all(family[name] in vocabulary for name in ("prefix", "suffix", "middle")):
            return Infill(
                prefix=vocabulary[family["prefix"]],
                suffix=vocabulary[family["suffix"]],
                middle=vocabulary[family["middle"]],
                repository=vocabulary.get(family["repository"]),
                file=vocabulary.get(family["file"]),
                stops=frozenset(vocabulary[stop] for stop in family["stops"] if stop in vocabulary),
            )
    return None


def plain(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Token ids of a text in which markers are mere text.

    A marker is cut after its first character and both sides are encoded on their own, so that no tokenizer finds it.
    Raises RequestError for text that no UTF-8 can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text to fill in is not text that UTF-8 can hold ({error.reason})") from None
    cuts = [found.start() + 1 for found in _markers(tokenizer).finditer(text)]
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [token for piece in pieces if piece for token in tokenizer.encode(piece, add_special_tokens=False)]


def _markers(tokenizer: TokenizerWrapper) -> re.Pattern[str]:
    """Finds every place where an added token is spelled, those that overlap too.

    One of a single character cannot be cut; one of white space is text, not a marker.
    """
    spelled = {token.content for token in tokenizer.added_tokens_decoder.values()}
    alternatives = sorted(text for text in spelled if len(text) > 1 and text.strip())
    return re.compile(f"(?={'|'.join(map(re.escape, alternatives))})" if alternatives else "(?!)")


@cache
def _families() -> list[dict[str, Any]]:
    data = tomllib.loads(Path(__file__).with_name("infill.toml").read_text("utf-8"))
    return cast(list[dict[str, Any]], data["infill"])
