"""Whether a text fits into memory, known before its prompt is read: nothing is begun that cannot be ended."""

import logging
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from mtp_mlx import memory
from mtp_mlx.errors import BusyError, RequestError
from mtp_mlx.types import Pair

LIKELY = 4096  # tokens of a text that may be as long as it likes

_log = logging.getLogger(__name__)


class Admission(NamedTuple):
    """What a text is given."""

    tokens: int  # that may follow its prompt
    short: int  # bytes of what may be evicted that have to go for it
    promised: int  # bytes that others must not count on


class Claims(NamedTuple):
    """Bytes of texts that are being read or written."""

    held: int = 0
    due: int = 0  # promised to them, and not taken yet

    @classmethod
    def of(cls, texts: Iterable[tuple[int, int]]) -> "Claims":
        """Of texts that hold so many bytes and have been promised so many."""
        known = list(texts)
        return cls(sum(held for held, _ in known), sum(max(0, promised - held) for held, promised in known))


def admit(
    pair: Pair, prompt: int, budget: int, *, endless: bool, evictable: int = 0, claims: Claims | None = None
) -> Admission:
    """What a prompt of so many tokens is given: `budget` tokens, or fewer if it is all that the context holds
    (`endless`) and memory does not.

    Raises RequestError where keys and values would not fit beside what is in memory already, `evictable` bytes of
    that apart, and BusyError where they will once other texts, with `claims` of their own, have ended.
    """
    held, due = claims or Claims()
    free = max(0, memory.free_bytes() - due)
    room = free + evictable
    if held + due and _likely(pair, prompt, budget, endless) > room:
        _granted(pair, prompt, budget, max(0, memory.free_bytes()) + held + evictable, endless)
        raise BusyError("other texts have the memory that this one needs; ask again later")
    granted = _granted(pair, prompt, budget, room, endless)
    if granted < budget:
        _log.warning("memory holds %d tokens after this prompt; the text ends there at the latest", granted)
    promised = _likely(pair, prompt, granted, endless)
    return Admission(granted, max(0, promised - free), promised)


def _granted(pair: Pair, prompt: int, budget: int, room: int, endless: bool) -> int:
    """How many of `budget` tokens there is room for."""
    if _needed(pair, prompt + budget) <= room:
        return budget
    most = bisect_right(range(1, budget + 1), room, key=lambda count: _needed(pair, prompt + count))
    if not endless or not most:
        raise RequestError(_refusal(pair, prompt, budget, room))
    return most


def _likely(pair: Pair, prompt: int, budget: int, endless: bool) -> int:
    """Bytes of a text: one without an end of its own is not likely to need all that it may take."""
    return _needed(pair, prompt + (min(budget, LIKELY) if endless else budget))


def _needed(pair: Pair, tokens: int, kv_bits: int | None = None) -> int:
    return pair.target.kv_bytes(tokens, kv_bits or pair.kv_bits) + pair.drafter.kv_bytes(tokens)


def _refusal(pair: Pair, prompt: int, budget: int, free: int) -> str:
    needed, remedies = _needed(pair, prompt + budget), []
    for bits in (8, 4):
        if bits < (pair.kv_bits or 16) and _needed(pair, prompt + budget, bits) <= free:
            remedies.append(f"--kv-bits {bits}")
            break
    fits = budget > 1 and _needed(pair, prompt + 1) <= free
    remedies.append("fewer --max-tokens" if fits else "a shorter prompt")
    return (
        f"this prompt of {prompt} tokens and {budget} more need {_size(needed)} of keys and values, "
        f"{_size(free)} are free; use {' or '.join(remedies)}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
