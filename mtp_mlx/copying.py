"""What could be copied next: where a text says again what it said before, its next tokens are drafts for free.

Prompt lookup decoding (Saxena 2023; REST, arXiv 2311.08252, looks up a data base instead) over prompt and output, and
over a text that the caller expects, such as a file before an edit. Token ids in, token ids out; nothing is ever
proposed that the target does not verify.
"""

from collections.abc import Sequence

MIN_MATCH = 8  # tokens that must agree before a place is copied from: with a drafter at hand, shorter ones lose
MIN_PREDICTED = 3  # the same for the predicted text, which the output is known to resemble
LONGEST = 64  # tokens compared to tell a better place from a worse one
PLACES = 8  # compared at most
PLACES_PREDICTED = 256  # of the predicted text, from which the nearest are compared
MISSES, PAUSE = 4, 8  # copies wrong from the first token on, in a row, after which so many rounds propose nothing


class Index:
    """A text that grows, and where each run of `n` tokens in it was followed by another token."""

    def __init__(self, n: int, tokens: Sequence[int] = ()):
        self.n = n
        self.tokens: list[int] = []
        self.latest: dict[int, int] = {}  # hash of a run -> last position of what followed it
        self.earlier: list[int] = []  # position -> the one before it that followed the same run, or -1
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        for place in range(len(self.earlier), len(self.tokens)):
            # Hashes in place of runs: a long prompt makes no objects that the garbage collector would walk over.
            run = hash(tuple(self.tokens[max(0, place - self.n) : place]))
            self.earlier.append(self.latest.get(run, -1))
            self.latest[run] = place

    def after(self, text: list[int], most: int) -> list[int]:
        """Positions of what followed the last n tokens of `text`, the latest first."""
        places: list[int] = []
        place = self.latest.get(hash(tuple(text[-self.n :])), -1)
        while place >= self.n and len(places) < most:
            places.append(place)
            place = self.earlier[place]
        return places

    def agreeing(self, place: int, text: list[int]) -> int:
        """How many tokens before `place` are those at the end of `text`, LONGEST at most."""
        most = min(place, len(text), LONGEST)
        return next((i for i in range(most) if self.tokens[place - 1 - i] != text[-1 - i]), most)


class Copies:
    """What could be copied next in one text, from what came before or from what its caller predicts.

    `prompt` and `predicted` are token ids. The prediction is followed from its beginning; where the output leaves it,
    the place at which it comes back is looked for, so that words may be put in, left out or replaced.
    """

    def __init__(self, prompt: Sequence[int], predicted: Sequence[int] = ()):
        self.text = Index(MIN_MATCH, prompt)
        self.predicted = Index(MIN_PREDICTED, predicted)
        self.output: list[int] = []
        self.place = 0  # how far the output has got in the predicted text
        self.following = bool(predicted)
        self.misses = 0
        self.pause = 0  # rounds still to be passed over

    def extend(self, tokens: Sequence[int]) -> None:
        """Learn what a round has emitted."""
        self.pause = max(0, self.pause - 1)
        self.text.extend(tokens)
        self.output += tokens
        for token in tokens:
            self.following = self.following and self.predicted.tokens[self.place : self.place + 1] == [token]
            self.place += self.following
        if not self.following:
            self._find_place()

    def _find_place(self) -> None:
        """Where the output has come back to the predicted text: the best agreement, then the next place ahead."""
        places = self.predicted.after(self.output, PLACES_PREDICTED)
        near = sorted(places, key=lambda place: (place < self.place, abs(place - self.place)))[:PLACES]
        place = max(near, key=lambda place: self.predicted.agreeing(place, self.output), default=0)
        if self.predicted.agreeing(place, self.output) >= MIN_PREDICTED:
            self.place, self.following = place, True

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none where nothing matches well enough. Asking changes nothing."""
        if self.pause:
            return []
        predicted = self.predicted.tokens[self.place : self.place + most] if self.following else []
        return predicted or self._repeat(most)

    def _repeat(self, most: int) -> list[int]:
        """What followed the last time, no longer than the agreement: a short one promises little.

        One that is longer than the way back to its place is a loop, and goes on: ...abcabcabc is followed by abcabc.
        """
        text = self.text.tokens
        places = self.text.after(text, PLACES)  # the latest wins a tie
        place = max(places, key=lambda place: self.text.agreeing(place, text), default=0)
        agreeing, period = self.text.agreeing(place, text), len(text) - place
        length = min(most, agreeing) if agreeing >= MIN_MATCH else 0
        return [text[place + i % period] for i in range(length)]

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn how a copy fared; `drafted` of its tokens were verified."""
        self.misses = self.misses + 1 if drafted and not accepted else 0
        if self.misses == MISSES:
            self.misses, self.pause = 0, PAUSE
