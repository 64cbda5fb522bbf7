"""Prompt-lookup speculation: guesses the next tokens where the text repeats itself, where that pays.

Called by stream.py, which verifies every guess with the model itself, so that the output is that of plain decoding.
(Saxena 2023, "Prompt lookup decoding"; verification: Leviathan et al. 2023.) It never sees the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SHORTEST, LONGEST = 2, 4  # n-grams looked up, longest first
MATCH = 12  # tokens up to which a match is measured
WORTH = 1.03  # a guess must promise this much more speed
LEAST_SECONDS = 2e-4  # of a token; looking up in Python takes some microseconds for each
PRIOR_RIGHT, PRIOR_SLOPE = 0.5, 0.35  # before anything is known; the slope as measured on a 4B, batches of 4


class PromptLookup:
    """Drafts by n-gram lookup in all tokens so far, prompt and output.

    At every token it also looks whether a guess would have been right, by the length of the match: so the text itself
    tells how far a draft is worth verifying, and nothing is spent on finding out.

    Args:
        tokens: the prompt. most: longest draft.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._most = most
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its newest continuation starts
        # By length of the match: how many guesses were right and how many were made, both decaying alike.
        self._right = [2 * PRIOR_RIGHT] * (MATCH + 1)
        self._made = [2.0] * (MATCH + 1)
        self._learnt = 0  # tokens that the above know of
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the text."""
        self._tokens.extend(tokens)

    def _learn(self) -> None:
        tokens = self._tokens
        for end in range(self._learnt, len(tokens)):
            at, match = self._find(end)
            if match:
                self._right[match] = 0.98 * self._right[match] + (tokens[at] == tokens[end])
                self._made[match] = 0.98 * self._made[match] + 1
            # Index what ended before this token, so that a lookup of the newest n-gram finds an earlier one.
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._learnt = len(tokens)

    def draft(self, seconds: Callable[[int], float], room: int) -> list[int]:
        """What followed the newest earlier place that ends like the text does, repeated where that is too short.

        As long as it promises the most tokens per second, and empty where nothing is gained.

        Args:
            seconds: what verifying a batch of that many tokens takes. room: longest draft that may be used.
        """
        self._learn()
        at, match = self._find(len(self._tokens))
        if not match:
            return []
        best, length = WORTH / seconds(1), 0
        expected = chance = 1.0
        for i in range(min(self._most, room)):
            reached = min(match + i, MATCH)
            chance *= self._right[reached] / self._made[reached]
            expected += chance
            if expected / seconds(i + 2) > best:
                best, length = expected / seconds(i + 2), i + 1
        period = len(self._tokens) - at
        return [self._tokens[at + i % period] for i in range(length)]

    def _find(self, end: int) -> tuple[int, int]:
        """(where the newest continuation starts of what ends at `end`, tokens that agree, at most MATCH; 0: none)."""
        tokens = self._tokens
        for n in range(min(LONGEST, end), SHORTEST - 1, -1):
            at = self._after.get(tuple(tokens[end - n : end]))
            if at is not None:
                match = n
                while match < min(MATCH, at) and tokens[at - 1 - match] == tokens[end - 1 - match]:
                    match += 1
                return at, match
        return 0, 0


class BatchCosts:
    """What verifying a batch takes, against one token, as measured on this model.

    Under a memory budget a batch's time includes reading the experts that its tokens need beyond those of one, so
    their cost is counted as it is. What was measured fades, so that sizes that once were slow are tried again. One
    object serves all generations of a model. What it says never changes the output.
    """

    def __init__(self) -> None:
        self._single = 0.0
        # Of batches of 2, 3-4, 5-8, ... tokens: what each token beyond the first adds, in singles; and its weight.
        self._slope = [PRIOR_SLOPE] * 8
        self._weight = [0.0] * 8

    @property
    def worthwhile(self) -> bool:
        """Whether a single token has been measured, and takes so long that looking for a guess may pay."""
        return self._single > LEAST_SECONDS

    def measured(self, tokens: int, seconds: float) -> None:
        """A batch of so many tokens took so long."""
        if tokens == 1:
            # One step that something else held up must not look like the price of all.
            usual = min(seconds, 3 * self._single) if self._single else seconds
            self._single = 0.8 * self._single + 0.2 * usual if self._single else seconds
        self._weight = [0.99 * weight for weight in self._weight]
        if tokens > 1 and self._single:
            i = (tokens - 1).bit_length() - 1
            slope = min(max(0.0, (seconds / self._single - 1) / (tokens - 1)), 3.0)
            self._slope[i] = (self._weight[i] * self._slope[i] + slope) / (self._weight[i] + 1)
            self._weight[i] = min(self._weight[i] + 1, 5.0)

    def seconds(self, tokens: int) -> float:
        """What a batch of so many tokens will take; for sizes not measured lately, as those below them suggest."""
        if tokens == 1:
            return self._single
        slope = PRIOR_SLOPE
        for i in range((tokens - 1).bit_length()):
            slope = (self._weight[i] * self._slope[i] + slope) / (self._weight[i] + 1)
        return self._single * (1 + slope * (tokens - 1))
