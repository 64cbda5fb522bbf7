"""What to drop when a conversation outgrows its context: works on token ids and computes nothing.

Called by model.py for a prompt that is too long, and by stream.py for an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from smallthinker_edge.text.tokenizer import Tokenizer


def shift_limit(context: int) -> int:
    """Tokens that a shift leaves at most: three quarters of the context, so that the next one is a while away."""
    return context - max(1, context // 4)


class TurnDropper:
    """Drops the oldest turns of a ChatML conversation and keeps the system prompt.

    A turn is a user's message and all that follows up to the next user's message. Text without such marks loses its
    oldest tokens, except for a beginning-of-sequence token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._start = tokenizer.special_id("<|im_start|>")
        self._user = tokenizer.encode("user\n", add_bos=False)
        self._bos = tokenizer.bos_id

    def __call__(self, tokens: Sequence[int], limit: int) -> list[int] | None:
        """The shortened ids, at most `limit`; None where the newest turn and the system prompt alone are longer."""
        ids = list(tokens)
        starts = [i for i, token in enumerate(ids) if token == self._start]
        turns = [i for i in starts if ids[i + 1 : i + 1 + len(self._user)] == self._user]
        if not turns:
            if starts:  # one message that is not the user's: there is no turn to drop
                return ids if len(ids) <= limit else None
            head = ids[:1] if ids[:1] == [self._bos] else []
            return head + ids[len(head) :][-(limit - len(head)) :] if len(ids) > limit else ids
        head = ids[: turns[0]]
        for at in turns:
            if len(head) + len(ids) - at <= limit:
                return head + ids[at:]
        return None
