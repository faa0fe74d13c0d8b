"""How deep to draft and what it may bring, before anything has been measured: an estimate from published curves.

With acceptance p, k drafts bring tau = (1 - p^(k+1)) / (1 - p) tokens a round, and a round costs C(k+1) + k d + h plain
steps: the target over k+1 rows, the drafts, and what the host does.
"""

import tomllib
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mtp_mlx.errors import RequestError

ACCEPTANCE = 0.7  # of a draft whose predecessors were all accepted: in the middle of what is published
OVERHEAD = 0.03  # h: a clean loop's share of a plain step
OVERLAP = 0.31  # by how much the experts of neighbouring tokens are fewer than independent choices would make them
DEEPEST = 8


@dataclass(frozen=True)
class Chip:
    """A class of processors, and what rows cost there."""

    name: str
    stands_for: tuple[str, ...]
    source: str
    cost: tuple[tuple[int, float], ...]  # (rows, C(rows)/C(1)), ascending

    def factor(self, rows: int) -> float:
        """C(rows)/C(1), on a line through the entries on both sides, or the last two."""
        known = [at for at, _ in self.cost]
        right = min(max(bisect_left(known, rows), 1), len(known) - 1)
        (a, low), (b, high) = self.cost[right - 1], self.cost[right]
        return low + (high - low) * (rows - a) / (b - a)


@dataclass(frozen=True)
class Estimate:
    """The depth with the best expected speed on one class of processors."""

    chip: Chip
    depth: int
    tokens_per_round: float
    speedup: float  # over plain decoding; 1 at depth 0


@cache
def chips() -> tuple[Chip, ...]:
    """What chips.toml says."""
    with (Path(__file__).parent / "chips.toml").open("rb") as file:
        entries = tomllib.load(file)["chips"]
    return tuple(
        Chip(e["name"], tuple(e["for"]), e["source"], tuple(sorted((int(m), c) for m, c in e["cost"].items())))
        for e in entries
    )


def this_chip(device: str) -> Chip | None:
    """The class that stands in for a device, by the longest beginning of its name."""
    fits = [(len(start), chip) for chip in chips() for start in chip.stands_for if device.startswith(start)]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def estimate(chip: Chip, step: float, bytes_factor: tuple[float, ...], acceptance: float = ACCEPTANCE) -> Estimate:
    """The best depth. `step` is a draft's cost in plain steps, `bytes_factor[k]` what k+1 rows read beside one.

    A mixture of experts reads more for more rows; where that is more than the chip's curve says, it decides. Raises
    RequestError for an acceptance that is no probability.
    """
    if not 0 <= acceptance < 1:
        raise RequestError(f"acceptance {acceptance} is not a probability below 1; 0.5 to 0.9 are usual")
    found = [Estimate(chip, 0, 1.0, 1.0)]
    for k in range(1, len(bytes_factor)):
        tokens = (1 - acceptance ** (k + 1)) / (1 - acceptance)
        cost = max(chip.factor(k + 1), bytes_factor[k]) + k * step + OVERHEAD
        found.append(Estimate(chip, k, tokens, tokens / cost))
    return max(found, key=lambda entry: entry.speedup)
