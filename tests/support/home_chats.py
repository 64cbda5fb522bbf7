"""Conversations with the embedded model and their right answers, for tests that need text it was made for."""

from __future__ import annotations

import random

import annotated


def home_chats(count: int, seed: int = 5) -> list[str]:
    """`count` sentences of the training data with their answers, as the model's chat template writes them."""
    drawn = random.Random(seed).sample(annotated.own_sentences(), count)
    return [
        f"<|im_start|>user\n{one.text}<|im_end|>\n<|im_start|>assistant\n{one.answer}<|im_end|>" for one in drawn
    ]  # fmt: skip
