"""Prompt-lookup speculation: guesses the next tokens where the text repeats itself, and knows when that does not pay.

Called by generation.py, which verifies every guess with the model itself, so that the output is that of plain decoding.
(Saxena 2023, "Prompt lookup decoding"; verification: Leviathan et al. 2023.) It never sees the model.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # n-grams looked for, longest first
TRIALS = 4  # guesses before judging
PAUSE = 32  # tokens without guessing after it lost; doubled every time in a row


class PromptLookup:
    """Drafts by n-gram lookup in all tokens so far, prompt and output.

    Args:
        tokens: the prompt. most: longest draft.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._most = most
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its newest continuation starts
        self._length = most
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the text."""
        for token in tokens:
            # Index what ended before this token, so that a lookup of the newest n-gram finds an earlier one.
            for n in range(SHORTEST, LONGEST + 1):
                if len(self._tokens) >= n:
                    self._after[tuple(self._tokens[-n:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self) -> list[int]:
        """What followed the newest earlier place that ends like the text does, repeated where that is too short.

        Empty where there is no such place.
        """
        for n in range(LONGEST, SHORTEST - 1, -1):
            at = self._after.get(tuple(self._tokens[-n:])) if len(self._tokens) >= n else None
            if at is not None:
                period = len(self._tokens) - at
                return [self._tokens[at + i % period] for i in range(self._length)]
        return []

    def accepted(self, count: int, drafted: int) -> None:
        """Learns how far a draft went: longer ones after success, shorter ones after failure."""
        self._length = min(self._most, max(1, 2 * count if count == drafted else count + 1))


class Governor:
    """Decides from measured times whether to guess.

    It compares tokens per second of verified batches with that of single tokens. Under a memory budget the time of a
    batch includes reading the experts that its tokens need beyond those of one, so their cost is counted as it is.
    What is decided never changes the output.
    """

    def __init__(self) -> None:
        self._single = 0.0  # seconds of a token on its own, smoothed
        self._singles = 0
        self._seconds = self._tokens = 0.0  # of batches, both decaying alike
        self._trials = self._pause = 0
        self._next_pause = PAUSE

    @property
    def wants_draft(self) -> bool:
        """Whether the next step should be a batch."""
        return self._pause == 0 and self._singles >= 2

    def single(self, seconds: float) -> None:
        """One token took this long."""
        self._single = seconds if self._singles == 0 else 0.8 * self._single + 0.2 * seconds
        self._singles += 1
        self._pause = max(0, self._pause - 1)

    def batch(self, seconds: float, tokens: int) -> None:
        """A verified batch gave `tokens` tokens in this time."""
        self._seconds = 0.8 * self._seconds + seconds
        self._tokens = 0.8 * self._tokens + tokens
        self._trials += 1
        if self._trials < TRIALS:
            return
        if self._tokens * self._single < self._seconds:
            self._pause, self._next_pause = self._next_pause, 2 * self._next_pause
            self._seconds = self._tokens = 0.0
            self._trials = 0
        else:
            self._next_pause = PAUSE
