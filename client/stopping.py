"""Stop strings: where a text ends, found however it is cut into pieces.

The first stop string to be complete ends the text; of two that are complete at the same character, the longer one, as
it began earlier. Text that may turn out to belong to one is held back, and nothing more: each stop string has a state
of Knuth, Morris and Pratt's automaton (how many of its characters the text ends with), and the longest state is what
is held. The work is linear in the length of the text.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The end of one growing text. `stops` are not empty, and neither is any of them."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string belongs to the text that it ends."""
        self._stops = stops
        self._fallbacks = [_fallbacks(stop) for stop in stops]
        self._states = [0] * len(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """The text that became certain with these characters; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        for i, character in enumerate(text):
            complete = self._advance(character)
            if complete is not None:
                self.found = complete
                whole = self._held + text[: i + 1]
                self._held = ""
                return whole if self._include else whole[: -len(complete)]
        whole = self._held + text
        cut = len(whole) - max(self._states)
        self._held = whole[cut:]
        return whole[:cut]

    def finish(self) -> str:
        """What was held back, given that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Takes one character; the stop string that it completes, the longest if there are several."""
        complete: str | None = None
        for index, stop in enumerate(self._stops):
            state = self._states[index]
            while state and stop[state] != character:
                state = self._fallbacks[index][state]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                if complete is None or len(stop) > len(complete):
                    complete = stop
                state = self._fallbacks[index][state]
            self._states[index] = state
        return complete


def _fallbacks(stop: str) -> list[int]:
    """For each number of matched characters, how many still match when the next one does not: the longest proper
    prefix of `stop[:matched]` that is also its suffix."""
    table = [0, 0]
    for character in stop[1:]:
        state = table[-1]
        while state and stop[state] != character:
            state = table[state]
        table.append(state + 1 if stop[state] == character else 0)
    return table
