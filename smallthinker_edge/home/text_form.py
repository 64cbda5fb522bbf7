"""The form in which the home model reads a sentence.

Lower case, words with single spaces, no punctuation but commas, apostrophes and those within numbers. Knows nothing of
models.
"""

from __future__ import annotations

import re
import unicodedata

# Punctuation that belongs to a word or number: 21.5, 7:30, don't, "milk, eggs", re-run, a/c, r&b.
_TOKEN = re.compile(r"\d+(?:[.,:]\d+)*|[^\W_]+(?:['&/.-](?=[^\W_])[^\W_]+)*|,|°c|°f|[%°€$£+]", re.UNICODE)
_SPOKEN = {"%": "percent", "°": "degrees", "°c": "degrees", "°f": "degrees fahrenheit"}
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "`": "'", "\u00b4": "'"})
MOST_CHARACTERS = 500  # of a sentence; a spoken command has rarely more than 100


def model_form(text: str) -> str:
    """A sentence as the model reads it; what is too long is cut at MOST_CHARACTERS."""
    text = unicodedata.normalize("NFC", text).translate(_QUOTES).lower()[:MOST_CHARACTERS]
    words = [_SPOKEN.get(token, token) for token in _TOKEN.findall(text)]
    return re.sub(r" ,(?: ,)*", ",", " ".join(words)).strip(", ")
