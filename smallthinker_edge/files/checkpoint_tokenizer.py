"""The tokenizer and the chat templates of a Hugging Face checkpoint folder, as a GGUF file wants them.

Called by convert.py. Nothing in the JSON files is trusted: what is missing, of another kind or ambiguous is a
ModelFormatError that names file and field.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.checkpoint import optional_json, read_json
from smallthinker_edge.printable import printable
from smallthinker_edge.text.tokenizer import QWEN2_SPLIT

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
MAX_TEMPLATE = 1 << 20  # characters; the longest in use have 20,000


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their GGUF types by id, padded to the model's vocabulary; merges as "left right"."""

    tokens: list[str]
    types: list[int]
    merges: list[str]


def read_vocabulary(folder: str, size: int) -> Vocabulary:
    """The byte-level BPE of tokenizer.json, with added tokens of it and of tokenizer_config.json.

    An added token is a control token where its `special` is true, else user-defined; it may repeat an entry of the
    vocabulary, and then says what kind that is.
    """
    path = os.path.join(folder, "tokenizer.json")
    tokenizer = read_json(path)

    def error(message: str, field: str) -> ModelFormatError:
        return ModelFormatError(message, path=path, field=field)

    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise error("is not a BPE model", "model.type")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not vocab or not all(map(_is_id, vocab.values())):
        raise error("is not an object of tokens and ids", "model.vocab")
    if not isinstance(merges, list) or not merges:
        raise error("is not a list of merges", "model.merges")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise error("is not supported", f"model.{key}")
    tokens = {id_: (token, NORMAL) for token, id_ in vocab.items()}
    if len(tokens) != len(vocab):
        raise error("gives one id to two tokens", "model.vocab")
    for id_, token, special in _added_tokens(folder, path, tokenizer):
        if tokens.get(id_, (token,))[0] != token or vocab.get(token, id_) != id_:
            raise error(f"{token!r:.80} with id {id_} contradicts the vocabulary", "added_tokens")
        tokens[id_] = (token, CONTROL if special else USER_DEFINED)
    if max(tokens) >= size:
        raise error(f"has ids beyond the vocabulary of {size}", "model.vocab")
    _note_other_splits(path, tokenizer.get("pre_tokenizer"))
    table = [tokens.get(id_, (f"[PAD{id_}]", UNUSED)) for id_ in range(size)]
    pairs = [_merge(path, i, merge) for i, merge in enumerate(merges)]
    return Vocabulary([token for token, _ in table], [kind for _, kind in table], pairs)


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _merge(path: str, i: int, merge: object) -> str:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
        raise ModelFormatError(f"merge {i} is not two tokens: {merge!r:.80}", path=path, field="model.merges")
    return " ".join(parts)


def _added_tokens(folder: str, path: str, tokenizer: dict[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """(id, text, special) of tokenizer.json; then those of tokenizer_config.json with ids that it has not."""
    seen: dict[int, str] = {}

    def checked(path: str, field: str, id_: object, entry: object) -> tuple[int, str, bool]:
        content, special = (entry.get("content"), entry.get("special")) if isinstance(entry, dict) else (None, None)
        if not isinstance(id_, int) or not _is_id(id_) or not isinstance(content, str) or not content:
            raise ModelFormatError(f"{entry!r:.80} has no id and content", path=path, field=field)
        if not isinstance(special, bool | None):
            raise ModelFormatError(f"{entry!r:.80}: special is not true or false", path=path, field=field)
        if seen.setdefault(id_, content) != content:
            raise ModelFormatError(f"id {id_} is {content!r:.80} and {seen[id_]!r:.80}", path=path, field=field)
        return id_, content, bool(special)

    entries = tokenizer.get("added_tokens") or []
    if not isinstance(entries, list):
        raise ModelFormatError("is not a list", path=path, field="added_tokens")
    for entry in entries:
        yield checked(path, "added_tokens", entry.get("id") if isinstance(entry, dict) else None, entry)
    path = os.path.join(folder, "tokenizer_config.json")
    decoder = optional_json(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ModelFormatError("is not an object", path=path, field="added_tokens_decoder")
    for key, entry in decoder.items():
        id_ = int(key) if key.isdecimal() and len(key) < 12 else None
        known = id_ in seen
        token = checked(path, "added_tokens_decoder", id_, entry)
        if not known:
            yield token


def _note_other_splits(path: str, pre_tokenizer: object) -> None:
    """Tells where text would be cut into words by another rule than Qwen2's, which is what our files say."""
    if not isinstance(pre_tokenizer, dict):
        return
    steps = pre_tokenizer.get("pretokenizers")
    for step in steps if isinstance(steps, list) else [pre_tokenizer]:
        pattern = step.get("pattern") if isinstance(step, dict) and step.get("type") == "Split" else None
        if isinstance(pattern, dict) and pattern.get("Regex") != QWEN2_SPLIT:
            message = f"{path}: pre_tokenizer is not Qwen2's: text may be cut into other tokens than in training"
            warnings.warn(printable(message), stacklevel=2)


def special_ids(folder: str, config: dict[str, Any], size: int) -> tuple[int | None, list[int], bool]:
    """(bos, ids that end a text, whether bos is put first) of generation_config.json, config.json and the tokenizer."""
    generation = optional_json(folder, "generation_config.json")
    settings = optional_json(folder, "tokenizer_config.json")

    def checked(key: str, value: object) -> int:
        if not _is_id(value) or not isinstance(value, int) or value >= size:
            raise ModelFormatError(f"must be a token id below {size}, not {value!r:.80}", path=folder, field=key)
        return value

    bos = config.get("bos_token_id")
    bos = generation.get("bos_token_id") if bos is None else bos
    eos = generation.get("eos_token_id")
    eos = config.get("eos_token_id") if eos is None else eos
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    first = settings.get("add_bos_token")
    if not isinstance(first, bool | None):
        raise ModelFormatError("must be true or false", path=folder, field="add_bos_token")
    return (
        None if bos is None else checked("bos_token_id", bos),
        [checked("eos_token_id", end) for end in ends],
        bool(first),
    )


def chat_templates(folder: str) -> dict[str, str]:
    """Chat templates by name, the main one as "default"; {} where there is none.

    Looked for as transformers does: chat_template.jinja, chat_template.json, then tokenizer_config.json, where it is a
    text or a list of {"name", "template"}; the folder additional_chat_templates adds to the first.
    """
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        return _checked(path, {"default": _text(path)} | _additional(folder))
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        template = optional_json(folder, name).get("chat_template")
        if isinstance(template, list):
            if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in template):
                raise ModelFormatError("is not a list of named templates", path=path, field="chat_template")
            template = {entry["name"]: entry.get("template") for entry in template}
        if template is not None:
            return _checked(path, template if isinstance(template, dict) else {"default": template})
    return {}


def _additional(folder: str) -> dict[str, str]:
    more = os.path.join(folder, "additional_chat_templates")
    names = sorted(name for name in os.listdir(more) if name.endswith(".jinja")) if os.path.isdir(more) else []
    return {name.removesuffix(".jinja"): _text(os.path.join(more, name)) for name in names}


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE + 1)
    except UnicodeDecodeError as problem:
        raise ModelFormatError(f"is not UTF-8: {problem}", path=path) from None


def _checked(path: str, templates: dict[Any, Any]) -> dict[str, str]:
    for name, template in templates.items():
        if not isinstance(name, str) or not isinstance(template, str) or len(template) > MAX_TEMPLATE:
            message = f"{name!r:.40} is not a text of up to {MAX_TEMPLATE} characters"
            raise ModelFormatError(message, path=path, field="chat_template")
    if "default" not in templates and len(templates) == 1:
        return {"default": next(iter(templates.values()))}
    if "default" not in templates:
        message = f"none of {', '.join(map(repr, templates)):.200} is called 'default'"
        raise ModelFormatError(message, path=path, field="chat_template")
    return templates
