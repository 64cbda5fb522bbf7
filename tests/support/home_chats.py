"""Conversations with the embedded model and their right answers, for tests that need text it was made for."""

from __future__ import annotations

import random

import annotated
from chat_form import END, prompt


def home_chats(count: int, seed: int = 5) -> list[str]:
    """`count` sentences of the training data with their answers, as the model's chat template writes them."""
    drawn = random.Random(seed).sample(annotated.own_sentences(), count)
    return [prompt([("user", one.text)]) + one.answer + END for one in drawn]
