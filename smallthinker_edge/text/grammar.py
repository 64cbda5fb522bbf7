"""Grammars over a vocabulary, through llguidance: which tokens may come next, and which must.

Made by opening.py or model.py, once per model; a Grammar serves one generation, as its `constraint`. Knows nothing of
requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from smallthinker_edge.errors import GrammarError, MissingExtra
from smallthinker_edge.text.tokenizer import Tokenizer

# JSON is written compactly: white space that may be anywhere would leave nothing forced, and a model could write it for
# ever. (llguidance's documentation, "JSON schema", "Whitespace handling".)
JSON_STYLE: Any = {"whitespace_flexible": False}


class _Vocabulary:
    """A Tokenizer as llguidance reads one. What is not shown in texts is special: no text contains it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        ids = range(tokenizer.vocab_size)
        self.eos_token_id, self.bos_token_id = min(tokenizer.eos_ids), tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in ids]
        self.special_token_ids = [token for token in ids if not tokenizer.is_shown(token)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False, parse_special=False)


class Grammars:
    """Makes constraints for one vocabulary. With Qwen2's 152k tokens that takes memory: see docs/api.md.

    Raises MissingExtra where llguidance is not installed, ValueError for a vocabulary without an end token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtra(
                "structured output needs llguidance: pip install 'smallthinker_edge[structured]' (it has wheels for "
                "x86-64 and ARM64 with glibc or musl; elsewhere pip needs a Rust compiler)"
            ) from error
        if not tokenizer.eos_ids:
            raise ValueError("this model's vocabulary has no end token, so nothing could end a document")
        self._library = llguidance
        self._vocab_size = tokenizer.vocab_size
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        # Without slices, which hold parts of the vocabulary again: with Qwen2's they take 35 MB and save 1.4 ms at
        # the first mask in free text, and nothing later.
        ends = sorted(tokenizer.eos_ids)
        self._tokenizer = llguidance.LLTokenizer(vocabulary, tokenizer.vocab_size, eos_token=ends, slices=[])
        del vocabulary.tokens, vocabulary._gtokenizer.tokens  # 152k objects of which it has made its own copy

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """Compact JSON that keeps to a schema. Raises GrammarError for a schema that cannot be enforced."""
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_STYLE)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the schema cannot be read: {error}") from None
        return self._grammar(grammar)

    def regex(self, pattern: str) -> Grammar:
        """A regular expression that the whole text matches, in the syntax of Rust's regex crate."""
        return self._grammar(self._library.LLMatcher.grammar_from_regex(pattern))

    def lark(self, source: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark, whose rule is `start`."""
        return self._grammar(self._library.LLMatcher.grammar_from_lark(source))

    def _grammar(self, source: str) -> Grammar:
        matcher = self._library.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be used: {_first_line(matcher.get_error())}")
        return Grammar(matcher, self._vocab_size)


class Grammar:
    """One text that keeps to a grammar, as an options.Constraint. For one generation."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((vocab_size + 31) // 32, np.uint32)

    def allowed(self) -> npt.NDArray[np.uint32]:
        """See options.Constraint; when the text is complete and cannot go on, only end tokens are left.

        Raises GrammarError where the grammar turns out too complex.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        return self._bits

    def accept(self, token: int) -> None:
        """See options.Constraint. Raises GrammarError for a token that is not allowed."""
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> Sequence[int]:
        """See options.Constraint."""
        return [] if self._matcher.is_stopped() else list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_first_line(self._matcher.get_error())}")


def _first_line(text: str) -> str:
    """Of an error, which llguidance follows with the state of its parser."""
    return text.partition("\n")[0][:500]
