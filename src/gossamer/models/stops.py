"""Stop strings: text that ends an answer and is not part of it, wherever pieces of the stream are cut."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.errors import SamplingError


class StopStrings:
    """Lets text through until one of ``stops`` is complete, and holds back what may become one.

    Of several the one that is complete first counts (of these the longest), so that the result does not
    depend on how the text was cut. ``found`` says that one appeared; nothing comes through after it.
    Raises SamplingError for an empty stop string.
    """

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(self._stops):
            raise SamplingError("a stop string is empty: it would end every answer before it begins")
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far is surely no part of a stop string, and was not given out yet."""
        if self.found:
            return ""
        text, self._held = self._held + text, ""
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found = True
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - held
        text, self._held = text[:cut], text[cut:]
        return text

    def finish(self) -> str:
        """What was held back and did not become a stop string; the text ends here."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of ``stop``, short of the whole, with which ``text`` ends."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
