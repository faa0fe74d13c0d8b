"""How often drafts have been right lately, and what that promises: expected tokens of a round."""

from dataclasses import dataclass, field

DECAY = 0.95  # weight of a round's drafts one round later: the last 20 rounds count
FIRST, FIRST_WEIGHT = 0.5, 1.0  # what is expected of the first draft before any was seen, worth one draft
PRIOR = 4.0  # drafts that the expectation from the position before is worth
COPY_FIRST, COPY_WEIGHT = 0.8, 3.0  # what is expected of a copied token before any was seen, worth three
COPY_DECAY, COPY_MEMORY = 0.9, 64.0  # copies come in long runs: a few rounds and some sixty tokens tell of the next
COPY_FADE = 0.995  # misses of copies are forgotten with time, so that a text that begins to repeat itself is noticed


@dataclass
class Chance:
    """Decayed counts of something that was right or wrong."""

    tried: float = 0.0
    right: float = 0.0

    def fade(self, factor: float) -> None:
        self.tried, self.right = factor * self.tried, factor * self.right

    def add(self, right: int, tried: int) -> None:
        self.tried, self.right = self.tried + tried, self.right + right

    def mean(self, prior: float, weight: float) -> float:
        """The chance of being right, where `prior` was expected with the weight of so many observations."""
        return (self.right + weight * prior) / (self.tried + weight)

    def remember(self, most: float) -> None:
        """Let what was seen so far count as `most` observations at most."""
        if self.tried > most:
            self.fade(most / self.tried)


@dataclass
class DraftChances:
    """The chance of each draft of a round to be right, given that those before it were."""

    positions: list[Chance] = field(default_factory=list)

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn of a round. Only the positions that were reached say anything: all accepted and the first rejected.

        Those not reached fade all the same, so that they follow the ones before them when a text turns hard.
        """
        self.positions += [Chance() for _ in range(drafted - len(self.positions))]
        for j, position in enumerate(self.positions[:drafted]):
            position.fade(DECAY)
            if j <= accepted:
                position.add(j < accepted, 1)

    def tokens(self, k: int) -> float:
        """Expected tokens of a round with k drafts, the target's own included.

        A position is taken to be like the one before it until enough drafts have reached it: a few unlucky ones
        at the far end would otherwise keep that depth from ever being tried again.
        """
        total, reached, chance, weight = 1.0, 1.0, FIRST, FIRST_WEIGHT
        for j in range(k):
            if j < len(self.positions):
                chance, weight = self.positions[j].mean(chance, weight), PRIOR
            reached *= chance
            total += reached
        return total

    def first(self) -> float | None:
        """The share of first drafts that were right lately, nothing assumed; None before there was any."""
        if not self.positions:
            return None
        return self.positions[0].right / self.positions[0].tried

    def remember(self, most: float) -> None:
        for position in self.positions:
            position.remember(most)


@dataclass
class CopyChance:
    """The chance of a copied token to be right, given that those before it were: taken as the same at any position."""

    tokens_copied: Chance = field(default_factory=Chance)

    def observe(self, drafted: int, accepted: int) -> None:
        self.tokens_copied.fade(COPY_DECAY)
        self.tokens_copied.add(accepted, min(accepted + 1, drafted))
        self.tokens_copied.remember(COPY_MEMORY)

    def pass_by(self) -> None:
        """A round went by, whatever it drafted."""
        self.tokens_copied.fade(COPY_FADE)

    def tokens(self, m: int, prior: float = COPY_FIRST) -> float:
        """Expected tokens of a round with m copied ones, the target's own included."""
        chance = self.tokens_copied.mean(prior, COPY_WEIGHT)
        return sum(chance**i for i in range(m + 1))

    def remember(self, most: float) -> None:
        self.tokens_copied.remember(most)
