"""Texts that end an output, found across the borders of tokens."""


class StopText:
    """Lets text through up to a stop text, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What can be given out for good, and the stop text that has come, if one has; of several the first counts."""
        text = self._held + text
        found = [stop for stop in self._stops if stop in text]
        if found:
            self._held = ""
            first = min(found, key=text.index)
            return text[: text.index(first)], first
        begun = self._begun(text)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun], None

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text

    def _begun(self, text: str) -> int:
        """Length of the longest end of a text with which a stop text begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stops):
                return length
        return 0
