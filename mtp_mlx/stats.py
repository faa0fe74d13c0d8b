"""What happened during a generation: counts, times and memory, as one value that grows round by round."""

from dataclasses import dataclass, field, replace
from typing import Any

from mtp_mlx.batch import Round
from mtp_mlx.depth import Depth


@dataclass(frozen=True)
class Phase:
    """Mean of the rounds that were split to time their phases."""

    seconds: float = 0.0
    samples: int = 0

    def add(self, seconds: float | None) -> "Phase":
        if seconds is None:
            return self
        return Phase(self.seconds + seconds, self.samples + 1)

    @property
    def ms(self) -> float | None:
        return 1e3 * self.seconds / self.samples if self.samples else None


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    target: int = 0
    drafter: int = 0
    cache: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Stats:
    """Figures of one generation so far."""

    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt, those that had been read before
    ttft_seconds: float = 0.0  # from the request to the first token
    generation_tokens: int = 0
    generation_seconds: float = 0.0  # all rounds
    rounds: int = 0
    shares: int = 0  # texts of each of these rounds, this one included, added up
    drafted: int = 0
    accepted: int = 0
    copied: int = 0  # of the drafts, those that were copies of earlier or predicted text
    copied_accepted: int = 0
    reached_per_position: tuple[int, ...] = ()  # drafts of the drafter's own made at each position
    accepted_at_position: tuple[int, ...] = ()  # of those, how many were kept
    commit: Phase = field(default_factory=Phase)
    draft: Phase = field(default_factory=Phase)
    verify: Phase = field(default_factory=Phase)
    host: Phase = field(default_factory=Phase)
    depth: int = 0  # drafts per round, as chosen by now
    depth_reason: str = ""
    alarm: str | None = None  # why drafting was given up for good, if it was
    memory: Memory = field(default_factory=Memory)
    compiled: bool = True  # whether rounds are traced and replayed, or built anew each time for want of a compiler

    def after(self, result: Round, depth: Depth, cache_bytes: int, peak_bytes: int) -> "Stats":
        """The figures with one more round in them."""
        drafted, accepted = result.drafted, result.accepted
        copied, copied_accepted = (drafted, accepted) if result.copied else (0, 0)
        own, own_accepted = drafted - copied, accepted - copied_accepted
        positions = range(max(own, len(self.reached_per_position)))
        # Phases are those of rounds at the depth in use: a mean over several depths would describe none.
        same = depth.k == self.depth
        commit, draft, verify, host = (self.commit, self.draft, self.verify, self.host) if same else (Phase(),) * 4
        times = result.times if drafted == depth.k and not result.copied else None
        return replace(
            self,
            generation_tokens=self.generation_tokens + len(result.tokens),
            generation_seconds=self.generation_seconds + result.times.total,
            rounds=self.rounds + 1,
            shares=self.shares + result.texts,
            drafted=self.drafted + drafted,
            accepted=self.accepted + accepted,
            copied=self.copied + copied,
            copied_accepted=self.copied_accepted + copied_accepted,
            reached_per_position=tuple(_at(self.reached_per_position, j) + (j < own) for j in positions),
            accepted_at_position=tuple(_at(self.accepted_at_position, j) + (j < own_accepted) for j in positions),
            commit=commit.add(times and times.commit),
            draft=draft.add(times and times.draft),
            verify=verify.add(times and times.verify),
            host=host.add(times.host if times and times.draft is not None else None),
            depth=depth.k,
            depth_reason=depth.reason(),
            alarm=depth.alarm,
            # Another text that begins meanwhile has the peak counted anew.
            memory=replace(self.memory, cache=cache_bytes, peak=max(self.memory.peak, peak_bytes)),
        )

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens that had to be read per second until the first token was there."""
        return (self.prompt_tokens - self.cached_tokens) / self.ttft_seconds if self.ttft_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        """Tokens per second of the rounds."""
        return self.generation_tokens / self.generation_seconds if self.generation_seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        return self.generation_tokens / self.rounds if self.rounds else 0.0

    @property
    def texts_per_round(self) -> float:
        """How many texts were written together, on average; 1 for one that was alone."""
        return self.shares / self.rounds if self.rounds else 0.0

    @property
    def accepted_per_position(self) -> list[float]:
        """Share of the drafter's own drafts at each position that were kept; not conditional on the ones before."""
        return [kept / made for kept, made in zip(self.accepted_at_position, self.reached_per_position, strict=True)]

    def figures(self) -> dict[str, Any]:
        """The figures under the names of `mtp-mlx generate --json`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "prompt_tps": self.prompt_tps,
            "generation_tokens": self.generation_tokens,
            "generation_tps": self.generation_tps,
            "ttft_s": self.ttft_seconds,
            "rounds": self.rounds,
            "tokens_per_round": self.tokens_per_round,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "copied": self.copied,
            "copied_accepted": self.copied_accepted,
            "accepted_per_position": self.accepted_per_position,
            "commit_ms": self.commit.ms,
            "draft_ms": self.draft.ms,
            "verify_ms": self.verify.ms,
            "host_ms": self.host.ms,
            "depth": self.depth,
            "depth_reason": self.depth_reason,
            "alarm": self.alarm,
            "compiled": self.compiled,
            "memory": {
                "target": self.memory.target,
                "drafter": self.memory.drafter,
                "cache": self.memory.cache,
                "peak": self.memory.peak,
            },
        }


def _at(counts: tuple[int, ...], j: int) -> int:
    return counts[j] if j < len(counts) else 0
