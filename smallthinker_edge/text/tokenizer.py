"""Text to token ids and back, from the vocabulary and merges in the GGUF file, through the `tokenizers` library.

Called by opening.py, model.py and chat.py. Text is taken as it is: no Unicode normalisation, so any bytes survive the
round trip. llama.cpp does the same; Hugging Face's Qwen2 tokenizer normalises to NFC, so text that is not in NFC
gets other ids there. This room never reads files.
"""

from __future__ import annotations

import codecs
import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice

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
# The regex engine behind `tokenizers` aborts the call after 10 million steps back in one match, which only a run of
# white space that long can cause. Runs are cut at this length; the round trip stays exact.
LONGEST_SPACE = 1 << 20


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
# By UTF-16 code unit: the byte that it stands for, NO_BYTE outside the alphabet.
NO_BYTE = 256
BYTE_OF_UNIT = np.full(1 << 16, NO_BYTE, np.uint16)
BYTE_OF_UNIT[[ord(character) for character in BYTE_OF]] = list(BYTE_OF.values())


_TOKEN = f"[{re.escape(''.join(BYTE_OF))}]+"
MERGE = re.compile(f"{_TOKEN} {_TOKEN}")
MERGES = re.compile(f"{MERGE.pattern}(?:\n{MERGE.pattern})*")
PIECE = 4096  # tokens or merges that are looked at together: quicker than one by one, and little memory


def _alphabet_bytes(token: str) -> bytes | None:
    """The bytes that a token of the byte alphabet spells, or None where a character is not of the alphabet."""
    spelled = BYTE_OF_UNIT[np.frombuffer(token.encode("utf-16-le", "surrogatepass"), "<u2")]
    return None if (spelled == NO_BYTE).any() else spelled.astype(np.uint8).tobytes()


def _pieces(items: Iterable[str]) -> Iterator[list[str]]:
    """PIECE of them at a time, and what is left."""
    iterator = iter(items)
    while piece := list(islice(iterator, PIECE)):
        yield piece


def _return_free_memory() -> None:
    """Gives freed heap pages back to the system where the C library can (glibc): 15 MB after loading Qwen2."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache  # each CDLL is a cycle
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


class Tokenizer:
    """Byte-level BPE with special tokens. Safe to use from several threads.

    Attributes:
        vocab_size: number of ids, unused padding included.
        bos_id: id put before a text when the file asks for it, or None.
        eos_id: the file's own end-of-sequence id, or None.
        add_bos: whether the file asks for bos_id before a text.
        eos_ids: ids that end a generation: the file's eos and eot, <|im_end|> and <|endoftext|> where present.

    With Qwen2's 152k tokens it takes about 45 MB, nearly all of it in the `tokenizers` library, a third of a second or
    more, and 110 MB while it is made.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        types: Sequence[int],
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
    ) -> None:
        """Args: as in the file's metadata; `merges` are "left right", `types` one number for each token.

        Raises ModelFormatError where merges or tokens do not make a byte-level BPE.
        """
        self.vocab_size = len(tokens)
        self.bos_id, self.eos_id, self.add_bos = bos_id, eos_id, add_bos
        self._specials: dict[str, int] = {}
        self._user_defined: set[str] = set()
        self._unseen: set[int] = set()
        vocabulary = self._load_tokens(tokens, types)
        self._bpe = _build_bpe(vocabulary, merges)
        del vocabulary
        self._byte_ids = [self._byte_id(byte) for byte in range(256)]
        self._special_ids = frozenset(self._specials.values())
        names = sorted(self._specials, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, names))) if names else None
        ends = {self._specials[name] for name in END_TOKENS if name in self._specials}
        self.eos_ids = frozenset(ends | set(eos_ids) | ({eos_id} if eos_id is not None else set()))
        _return_free_memory()

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Builds the tokenizer of a GGUF file's metadata; its string arrays may be any sequence of str.

        Raises ModelFormatError, naming the key, where something is missing or of another kind.
        """
        for name, only in (("model", "gpt2"), ("pre", "qwen2")):
            if (found := metadata.get(f"tokenizer.ggml.{name}")) != only:
                raise ModelFormatError(f"must be {only!r}, not {found!r:.40}", field=f"tokenizer.ggml.{name}")
        tokens, merges = (_strings(metadata, f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
        types = metadata.get("tokenizer.ggml.token_type")
        if not isinstance(types, Sequence) or len(types) != len(tokens):
            raise ModelFormatError("must hold one type for every token", field="tokenizer.ggml.token_type")
        if not all(kind is int for kind in {*map(type, types)}):
            raise ModelFormatError("must hold whole numbers", field="tokenizer.ggml.token_type")
        bos, eos, eot = (_token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "eot"))
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", False)
        if not isinstance(add_bos, bool):
            raise ModelFormatError("must be true or false", field="tokenizer.ggml.add_bos_token")
        if add_bos and bos is None:
            raise ModelFormatError("is set, but there is no bos_token_id", field="tokenizer.ggml.add_bos_token")
        ends = [] if eot is None else [eot]
        return cls(tokens, merges, types, bos_id=bos, eos_id=eos, eos_ids=ends, add_bos=add_bos)

    def _load_tokens(self, tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
        """Keeps all tokens' bytes in one block with offsets, a tenth of the memory of a list of bytes objects.

        Returns the vocabulary that BPE may produce.
        """
        blob, lengths = bytearray(), [0]
        vocabulary: dict[str, int] = {}
        for number, piece in enumerate(_pieces(tokens)):
            first = number * PIECE
            kinds = types[first : first + PIECE]
            plain = None if {CONTROL, USER_DEFINED, UNUSED} & set(kinds) else _alphabet_bytes("".join(piece))
            if plain is not None and all(piece):
                blob += plain
                lengths += map(len, piece)
                vocabulary.update(zip(piece, range(first, first + len(piece)), strict=True))
                continue
            for id_, (token, kind) in enumerate(zip(piece, kinds, strict=True), first):
                spelled, produced = self._load_token(id_, token, kind)
                blob += spelled
                lengths.append(len(spelled))
                if produced:
                    vocabulary[token] = id_
        self._blob, self._ends = bytes(blob), np.cumsum(lengths, dtype=np.int64)
        return vocabulary

    def _load_token(self, id_: int, token: str, kind: int) -> tuple[bytes, bool]:
        """A token's bytes, and whether BPE may produce it."""
        spelled, special = _alphabet_bytes(token), kind in (CONTROL, USER_DEFINED)
        if kind in (CONTROL, UNUSED):
            self._unseen.add(id_)
        if special and token:
            self._specials.setdefault(token, id_)
            if kind == USER_DEFINED:
                self._user_defined.add(token)
        # Merges may lead to a user-defined token and through it.
        produced = bool(spelled) and kind not in (CONTROL, UNUSED)
        return token.encode("utf-8", "surrogateescape") if special or spelled is None else spelled, produced

    def _byte_id(self, byte: int) -> int:
        id_: int | None = self._bpe.token_to_id(CHARACTER_OF[byte])
        if id_ is None:
            raise ModelFormatError(f"no token for byte {byte}", field="tokenizer.ggml.tokens")
        return id_

    def encode(self, text: str | bytes, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Token ids of a text; bytes that are not UTF-8 become their single-byte tokens.

        Args:
            text: str, or bytes of any content.
            add_bos: put bos_id first; None does what the file says.
            parse_special: recognise control and user-defined tokens such as <|im_end|>, the longest first; off,
                they are ordinary characters. Text from people belongs there with it off, see chat.encode_chat.

        Raises ValueError for a str with lone surrogates other than those of "surrogateescape".
        """
        ids: list[int] = []
        if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None:
            ids.append(self.bos_id)
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
        # Bytes that are not UTF-8 are lone surrogates now, each run of them between stretches of valid text.
        for piece in re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
            if "\udc80" <= piece[:1] <= "\udcff":
                ids += [self._byte_ids[byte] for byte in piece.encode("utf-8", "surrogateescape")]
            elif parse_special and self._special_pattern is not None:
                ids += self._encode_with_specials(piece, self._special_pattern)
            else:
                ids += self._encode_plain(piece)
        return ids

    def _encode_with_specials(self, text: str, pattern: re.Pattern[str]) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in pattern.finditer(text):
            ids += self._encode_plain(text[at : match.start()])
            ids.append(self._specials[match.group()])
            at = match.end()
        return ids + self._encode_plain(text[at:])

    def split_specials(self, text: str) -> list[tuple[str, int | None]]:
        """The text in pieces, each with the id of the special token that it is, or None; as encode() finds them."""
        if self._special_pattern is None:
            return [(text, None)]
        pieces: list[tuple[str, int | None]] = []
        at = 0
        for match in self._special_pattern.finditer(text):
            pieces += [(text[at : match.start()], None), (match.group(), self._specials[match.group()])]
            at = match.end()
        return [*pieces, (text[at:], None)]

    def special_names(self, *, user_defined: bool = False) -> list[str]:
        """The texts of control and user-defined tokens, the longest first; or of user-defined ones only."""
        names = self._user_defined if user_defined else self._specials
        return sorted(names, key=len, reverse=True)

    def _encode_plain(self, text: str) -> list[int]:
        return [id_ for part in _without_endless_space(text) for id_ in self._bpe.encode(part).ids]

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

    def tokens_with(self, texts: Iterable[str]) -> set[int]:
        """Ids of all tokens whose bytes contain one of the texts."""
        found: set[int] = set()
        for text in texts:
            part = text.encode("utf-8", "surrogateescape")
            at = self._blob.find(part)
            while at >= 0:
                token = int(np.searchsorted(self._ends, at, "right")) - 1
                if at + len(part) <= self._ends[token + 1]:
                    found.add(token)
                at = self._blob.find(part, at + 1)
        return found

    def special_id(self, name: str) -> int | None:
        """Id of a special token such as "<|im_end|>", or None."""
        return self._specials.get(name)

    def is_special(self, token: int) -> bool:
        """Whether the id is a control or user-defined token."""
        return token in self._special_ids

    def is_shown(self, token: int) -> bool:
        """Whether the id is part of an answer's text: control and unused tokens are not, user-defined ones are."""
        return token not in self._unseen

    def stream(self) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns an answer's tokens into text as they come; half a UTF-8 character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty; always for a token that is not shown."""
        if not self._tokenizer.is_shown(token):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left, with U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


def _build_bpe(vocabulary: dict[str, int], merges: Sequence[str]) -> BPETokenizer:
    """The library's tokenizer. By way of JSON it would take longer: docs/notes/2026-12-01-starts.md."""
    pairs: list[tuple[str, str]] = []
    for number, piece in enumerate(_pieces(merges)):
        lines = "\n".join(piece)
        if not MERGES.fullmatch(lines) or lines.count("\n") != len(piece) - 1:
            wrong = next(i for i, merge in enumerate(piece, number * PIECE) if not MERGE.fullmatch(merge))
            raise ModelFormatError(
                f"merge {wrong} is not two tokens and a space between", field="tokenizer.ggml.merges"
            )
        tokens = lines.replace("\n", " ").split(" ")
        pairs += zip(tokens[::2], tokens[1::2], strict=True)
    try:
        bpe = BPETokenizer(models.BPE(vocabulary, pairs))
    except Exception as error:  # the library raises Exception itself; only a merge can be wrong
        raise ModelFormatError(f"a merge is not of known tokens: {error}", field="tokenizer.ggml.merges") from None
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return bpe


def _without_endless_space(text: str) -> Iterator[str]:
    """The text in parts that hold no run of white space above LONGEST_SPACE, nearly always in one part."""
    at = 0
    if len(text) > LONGEST_SPACE:
        for run in re.finditer(r"\s+", text):
            while run.end() - max(at, run.start()) > LONGEST_SPACE:
                cut = max(at, run.start()) + LONGEST_SPACE
                yield text[at:cut]
                at = cut
    if at < len(text):
        yield text[at:] if at else text


def _token_id(metadata: Mapping[str, object], name: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ModelFormatError(f"must be a token id below {vocab_size}, not {value!r:.40}", field=key)
    return value


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
