"""Text to token ids and back, from the vocabulary and merges in the GGUF file, through the `tokenizers` library.

Called by model.py and chat.py. Text is taken as it is (no Unicode normalisation), so that any bytes survive the
round trip; this is what llama.cpp does too. It never reads files.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer

from smallthinker_edge.errors import ModelFormatError

# Qwen2's pre-tokeniser: contractions, words with at most one leading mark, single digits, punctuation, white space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
END_TOKENS = ("<|endoftext|>", "<|im_end|>")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Byte-level BPE with special tokens. Safe to use from several threads.

    Attributes:
        vocab_size: number of ids, unused padding included.
        bos_id: id put before a text when the file asks for it, or None.
        add_bos: whether the file asks for it.
        eos_ids: ids that end a generation.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        types: Sequence[int],
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
    ) -> None:
        self._alphabet = _byte_alphabet()
        self.vocab_size = len(tokens)
        self.bos_id, self.add_bos = bos_id, add_bos
        self._specials: dict[str, int] = {}
        self._load_bytes(tokens, types)
        self._bpe = self._build(tokens, merges, types)
        chars = {byte: char for char, byte in self._alphabet.items()}
        self._byte_ids: list[int] = [self._bpe.token_to_id(chars[byte]) or 0 for byte in range(256)]  # _build checked
        names = sorted(self._specials, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, names))) if names else None
        ends = {self._specials[name] for name in END_TOKENS if name in self._specials}
        self.eos_ids = frozenset(ends | set(eos_ids))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Builds the tokenizer of a GGUF file's metadata.

        Raises ModelFormatError, naming the key, where something is missing or of another kind.
        """
        if metadata.get("tokenizer.ggml.model") != "gpt2":
            raise ModelFormatError("only byte-level BPE ('gpt2') is supported", field="tokenizer.ggml.model")
        if metadata.get("tokenizer.ggml.pre", "qwen2") != "qwen2":
            raise ModelFormatError("only the 'qwen2' pre-tokeniser is supported", field="tokenizer.ggml.pre")
        tokens, merges = (_strings(metadata, f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
        types = metadata.get("tokenizer.ggml.token_type")
        if not isinstance(types, Sequence) or len(types) != len(tokens):
            raise ModelFormatError("must hold one type for every token", field="tokenizer.ggml.token_type")
        ids = {}
        for name in ("bos", "eos", "eot"):
            value = metadata.get(f"tokenizer.ggml.{name}_token_id")
            if value is not None and not (isinstance(value, int) and 0 <= value < len(tokens)):
                raise ModelFormatError("is outside the vocabulary", field=f"tokenizer.ggml.{name}_token_id")
            ids[name] = value
        ends = [id_ for name in ("eos", "eot") if (id_ := ids[name]) is not None]
        add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", False)) and ids["bos"] is not None
        return cls(tokens, merges, types, bos_id=ids["bos"], eos_ids=ends, add_bos=add_bos)

    def _load_bytes(self, tokens: Sequence[str], types: Sequence[int]) -> None:
        """All tokens' bytes in one block, with offsets: a tenth of the memory of a list of bytes objects."""
        blob, ends = bytearray(), []
        for id_, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind in (CONTROL, USER_DEFINED):
                self._specials[token] = id_
                blob += token.encode("utf-8", "surrogateescape")
            elif all(char in self._alphabet for char in token):
                blob += bytes(self._alphabet[char] for char in token)
            else:
                blob += token.encode("utf-8", "surrogateescape")
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), np.array([0, *ends], np.int64)

    def _build(self, tokens: Sequence[str], merges: Sequence[str], types: Sequence[int]) -> BPETokenizer:
        vocabulary = {token: id_ for id_, token in enumerate(tokens) if types[id_] not in (CONTROL, UNUSED)}
        pairs = []
        for i, merge in enumerate(merges):
            left, _, right = merge.partition(" ")
            if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
                raise ModelFormatError(f"merge {i} is not made of known tokens", field="tokenizer.ggml.merges")
            pairs.append((left, right))
        for char in self._alphabet:
            if char not in vocabulary:
                raise ModelFormatError(f"no token for byte {self._alphabet[char]}", field="tokenizer.ggml.tokens")
        bpe = BPETokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        return bpe

    def encode(self, text: str | bytes, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Token ids of a text; bytes that are not UTF-8 become their single-byte tokens.

        Args:
            text: str, or bytes of any content.
            add_bos: put bos_id first; None does what the file says.
            parse_special: recognise special tokens such as <|im_end|>; off, they are ordinary characters.
        """
        ids: list[int] = []
        if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None:
            ids.append(self.bos_id)
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogateescape")
        while text:
            try:
                valid, bad = text.decode("utf-8"), b""
                text = b""
            except UnicodeDecodeError as error:
                valid, bad = text[: error.start].decode("utf-8"), text[error.start : error.end]
                text = text[error.end :]
            ids += self._encode_valid(valid, parse_special)
            ids += [self._byte_ids[byte] for byte in bad]
        return ids

    def _encode_valid(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special or self._special_pattern is None:
            return self._bpe.encode(text).ids if text else []
        ids: list[int] = []
        at = 0
        for match in self._special_pattern.finditer(text):
            if match.start() > at:
                ids += self._bpe.encode(text[at : match.start()]).ids
            ids.append(self._specials[match.group()])
            at = match.end()
        return ids + (self._bpe.encode(text[at:]).ids if at < len(text) else [])

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token. Raises ValueError for an id outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        return self._blob[self._ends[token] : self._ends[token + 1]]

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The exact bytes of the tokens."""
        return b"".join(self.token_bytes(int(token)) for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens; bytes that are no UTF-8 show as U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def special_id(self, name: str) -> int | None:
        """Id of a special token such as "<|im_end|>", or None."""
        return self._specials.get(name)

    def is_special(self, token: int) -> bool:
        """Whether the id is a control or user-defined token."""
        return token in self._specials.values()

    def stream(self) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns tokens into text as they come; half a UTF-8 character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left, with U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


def _strings(metadata: Mapping[str, object], key: str) -> Sequence[str]:
    value = metadata.get(key)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str | bytes)
        or not len(value)
        or not isinstance(value[0], str)
    ):
        raise ModelFormatError("is missing or not an array of strings", field=key)
    return value
