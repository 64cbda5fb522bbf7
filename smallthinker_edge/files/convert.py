"""A Hugging Face checkpoint folder, or a GGUF file by way of requantize.py, to GGUF: `smallthinker-edge convert`.

Runs on the user's computer, never on the device: it needs the [convert] extra (the `gguf` package writes the
header). Streams: threads read, quantise and write pieces of a few megabytes, so memory does not grow with the model.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from smallthinker_edge._native.quantize import quantize
from smallthinker_edge.errors import ModelFormatError, SmallThinkerError
from smallthinker_edge.files.atomic import PartialFile, atomic_file
from smallthinker_edge.files.checkpoint import (
    MAX_CONTEXT,
    MAX_LAYERS,
    PREDICTOR_FILE,
    Checkpoint,
    CheckpointConfig,
)
from smallthinker_edge.files.checkpoint_tokenizer import chat_templates, read_vocabulary, special_ids
from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.gguf_entries import aligned
from smallthinker_edge.files.imatrix import ImportanceMatrix
from smallthinker_edge.files.torch_file import read_tensors
from smallthinker_edge.printable import printable
from smallthinker_edge.text.tokenizer import Tokenizer

T = TypeVar("T")
Progress = Callable[[int, int, str], None]
Sources = tuple[tuple[str, tuple[int, ...]], ...]
TYPES = ("q4_0", "q8_0", "f16")
LLAMA_CPP_WINDOW = 4096
SLICE = 1 << 22  # weights that one thread reads and quantises at a time
WORKERS = 4
PERIOD = 4
PREDICTOR = "model.lm_head_profiler"
BLOCK = 32


@dataclass(frozen=True)
class Tensor:
    """A tensor of the GGUF file: shape in NumPy order; `sources` (name, shape) are its data one after the other."""

    name: str
    type: Any
    shape: tuple[int, ...]
    sources: Sources
    bytes: int


class Converter:
    """One conversion: `Converter(folder, type).write(path)`. imatrix: of the model, for Q4_0; or None."""

    def __init__(self, folder: str, type_: str, imatrix: ImportanceMatrix | None = None) -> None:
        try:
            import gguf
        except ImportError:
            raise SmallThinkerError("converting needs: pip install 'smallthinker_edge[convert]'") from None
        self.gguf = gguf
        self.folder, self.imatrix = folder, imatrix
        self.config = CheckpointConfig(folder)
        self.checkpoint = Checkpoint(folder)
        self.type = gguf.GGMLQuantizationType[type_.upper()]
        self.float = gguf.GGMLQuantizationType.F32
        self.layers = self.config.integer("num_hidden_layers", MAX_LAYERS)
        self.d = self.config.integer("hidden_size")
        self.vocab = self.config.integer("vocab_size")
        self.experts = self.config.integer("moe_num_primary_experts")
        self.ffn = self.config.integer("moe_ffn_hidden_size")
        self.tied = self.config.flag("tie_word_embeddings", True)
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Refuses by name what our reader would refuse in the finished file."""
        config = self.config
        if config.integer("num_attention_heads") % config.integer("num_key_value_heads"):
            config.refuse("num_key_value_heads", "does not divide num_attention_heads")
        if config.integer("moe_num_active_primary_experts") > self.experts:
            config.refuse("moe_num_active_primary_experts", f"is more than the {self.experts} experts")
        rows = {"hidden_size": self.d, "moe_ffn_hidden_size": self.ffn}
        rows["head_dim"] = config.integer("num_attention_heads") * config.integer("head_dim")
        for key, row in rows.items():
            if row % BLOCK:
                config.refuse(key, f"makes matrix rows of {row}, which are not whole blocks of {BLOCK}")

    def write(self, path: str, progress: Progress) -> None:
        """Writes to a temporary file that takes the name when it is whole and our own reader accepts it."""
        tensors = list(self._tensors())
        with atomic_file(path) as file:
            writer = self.gguf.GGUFWriter(file.path, "smallthinker")
            try:
                self._metadata(writer)
                self._tokenizer(writer)
                self._check(tensors)
                for tensor in tensors:
                    bytes_shape = self.gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
                    dtype, raw = (np.float32, None) if tensor.type == self.float else (np.uint8, tensor.type)
                    stored = tensor.shape if raw is None else bytes_shape
                    writer.add_tensor_info(tensor.name, stored, np.dtype(dtype), tensor.bytes, raw)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            finally:
                writer.close()
            pieces = functools.partial(self._pieces, file)
            write_tensors(file, path, [(tensor, tensor.name, tensor.bytes) for tensor in tensors], pieces, progress)
            with GGUFFile(file.path) as written:
                ModelConfig.from_gguf(written)

    def _pieces(self, file: PartialFile, tensor: Tensor, at: int) -> Iterator[Callable[[], None]]:
        """What writes a tensor whose data begins at byte `at`, piece by piece."""
        for number, (_, shape) in enumerate(tensor.sources):
            size = math.prod(shape)
            step = SLICE if len(shape) == 1 else max(1, SLICE // shape[-1]) * shape[-1]  # whole rows of a matrix
            for first in range(0, size, step):
                count = min(step, size - first)
                yield functools.partial(self._write_piece, file, tensor, number, first, count, at)
                at += self._bytes(count, tensor.type)

    def _write_piece(self, file: PartialFile, tensor: Tensor, number: int, first: int, count: int, at: int) -> None:
        source, _ = tensor.sources[number]
        if tensor.type == self.float:
            data = self.checkpoint.floats(source, first, count)
            if not np.isfinite(data).all():
                raise ModelFormatError(
                    "holds values that are not finite", path=self.checkpoint.path_of(source), field=source
                )
            file.write(at, data.view(np.uint8))
            return
        try:
            elements = self.checkpoint.elements(source, first, count)
            if self.imatrix is not None and len(tensor.shape) > 1:
                file.write(at, self.imatrix.quantized(tensor.name, number, tensor.shape[-1], elements, self.tied))
            else:
                file.write(at, quantize(tensor.type.name, elements))
        except OverflowError as problem:
            raise ModelFormatError(str(problem), path=self.checkpoint.path_of(source), field=source) from None

    def _bytes(self, elements: int, type_: Any) -> int:
        block, size = self.gguf.GGML_QUANT_SIZES[type_]
        return int(elements // block * size)

    def _metadata(self, writer: Any) -> None:
        config, heads = self.config, self.config.integer("num_attention_heads")
        writer.add_name(os.path.basename(os.path.abspath(self.folder)))
        writer.add_file_type({"Q4_0": 2, "Q8_0": 7, "F16": 1}[self.type.name])
        writer.add_block_count(self.layers)
        writer.add_context_length(config.integer("max_position_embeddings", MAX_CONTEXT))
        writer.add_embedding_length(self.d)
        writer.add_feed_forward_length(self.ffn)
        writer.add_expert_feed_forward_length(self.ffn)
        writer.add_expert_count(self.experts)
        writer.add_expert_used_count(config.integer("moe_num_active_primary_experts"))
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.integer("num_key_value_heads"))
        writer.add_key_length(config.integer("head_dim"))
        writer.add_value_length(config.integer("head_dim"))
        writer.add_layer_norm_rms_eps(config.number("rms_norm_eps"))
        writer.add_rope_freq_base(config.rope_theta)
        softmax = config.flag("moe_primary_router_apply_softmax", False)
        writer.add_uint32("smallthinker.expert_gating_func", 1 if softmax else 2)
        self._attention_layout(writer)

    def _attention_layout(self, writer: Any) -> None:
        """Window and RoPE per layer, in llama.cpp's keys as far as they reach, in ours beyond."""
        window = self.config.layout("sliding_window_layout", self.layers, 0)
        rope = self.config.layout("rope_layout", self.layers, 1)
        expressible = all(rope)
        if any(window):
            size = self.config.integer("sliding_window_size")
            writer.add_sliding_window(size)
            regular = [layer % PERIOD != 0 for layer in range(self.layers)]
            if window != regular:
                writer.add_array("smallthinker.attention.sliding_window_pattern", window)
            expressible = rope == regular and size == LLAMA_CPP_WINDOW
            if expressible and self.layers == PERIOD:
                warnings.warn(
                    f"llama.cpp rotates every layer of a model with a window and exactly {PERIOD} layers, layer 0 too: "
                    "smallthinker_edge runs the file as the checkpoint says, llama.cpp will compute something else",
                    stacklevel=2,
                )
        if not expressible:
            writer.add_array("smallthinker.rope_layout", rope)
            warnings.warn(
                "this model's RoPE layers or window cannot be expressed in llama.cpp's keys: smallthinker_edge runs "
                "the file as the checkpoint says, llama.cpp will compute something else",
                stacklevel=2,
            )

    def _tokenizer(self, writer: Any) -> None:
        vocabulary = read_vocabulary(self.folder, self.vocab)
        try:  # what our own tokenizer makes of it
            Tokenizer(vocabulary.tokens, vocabulary.merges, vocabulary.types)
        except ModelFormatError as problem:
            raise ModelFormatError(
                str(problem), path=os.path.join(self.folder, "tokenizer.json"), field="model"
            ) from None
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        writer.add_token_merges(vocabulary.merges)
        bos, ends, add_bos = special_ids(self.folder, self.config.values, self.vocab)
        if bos is not None:
            writer.add_bos_token_id(bos)
        if ends:
            writer.add_eos_token_id(ends[0])
        if len(ends) > 1:
            writer.add_eot_token_id(ends[1])
        if len(ends) > 2:
            warnings.warn(f"a GGUF file has room for two end tokens; left out: {ends[2:]}", stacklevel=2)
        writer.add_add_bos_token(add_bos)
        templates = chat_templates(self.folder)
        if templates:
            writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])

    def _tensors(self) -> Iterator[Tensor]:
        """The tensors of the file, in its order."""
        d, heads = self.d, self.config.integer("num_attention_heads") * self.config.integer("head_dim")
        kv_heads = self.config.integer("num_key_value_heads") * self.config.integer("head_dim")
        yield self._matrix("token_embd", "model.embed_tokens", (self.vocab, d))
        yield self._plain("output_norm", "model.norm", (d,))
        if not self.tied:
            yield self._matrix("output", "lm_head", (self.vocab, d))
        for layer in range(self.layers):
            ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
            yield self._plain(ours + "attn_norm", theirs + "input_layernorm", (d,))
            yield self._matrix(ours + "attn_q", theirs + "self_attn.q_proj", (heads, d))
            yield self._matrix(ours + "attn_k", theirs + "self_attn.k_proj", (kv_heads, d))
            yield self._matrix(ours + "attn_v", theirs + "self_attn.v_proj", (kv_heads, d))
            yield self._matrix(ours + "attn_output", theirs + "self_attn.o_proj", (d, heads))
            yield self._plain(ours + "ffn_norm", theirs + "post_attention_layernorm", (d,))
            moe = theirs + "block_sparse_moe."
            yield self._plain(ours + "ffn_gate_inp", moe + "primary_router", (self.experts, d))
            for name, shape in (("gate", (self.ffn, d)), ("up", (self.ffn, d)), ("down", (d, self.ffn))):
                sources = tuple((f"{moe}experts.{e}.{name}.weight", shape) for e in range(self.experts))
                yield self._tensor(f"{ours}ffn_{name}_exps", self.type, (self.experts, *shape), sources)
        yield from self._predictor()

    def _predictor(self) -> Iterator[Tensor]:
        """The predictor of the LM head, where the checkpoint has one: always Q4_0, and one flat row."""
        sources: Sources = ()
        beside = os.path.join(self.folder, PREDICTOR_FILE)
        if PREDICTOR in self.checkpoint:
            sources = ((PREDICTOR, (self.checkpoint.size(PREDICTOR),)),)
            if os.path.exists(beside):
                message = f"{beside}: not read, because the checkpoint holds {PREDICTOR} too"
                warnings.warn(printable(message), stacklevel=2)
        elif os.path.exists(beside):
            sources = self._two_matrices(beside)
        else:
            return
        size = sum(math.prod(shape) for _, shape in sources)
        inner, rest = divmod(size, self.d + self.vocab)
        if rest or inner % BLOCK or not 0 < inner <= self.d:
            message = f"{size} elements are not {self.d} + {self.vocab} times a multiple of {BLOCK} up to {self.d}"
            raise ModelFormatError(message, path=self.checkpoint.path_of(sources[0][0]), field=sources[0][0])
        yield self._tensor("lm_head_profiler", self.gguf.GGMLQuantizationType.Q4_0, (size,), sources)

    def _two_matrices(self, path: str) -> Sources:
        """[K, d] and [V, K] of a torch file, told by their shapes, as tensors of the checkpoint."""
        found = read_tensors(path)
        shapes = {name: place.shape for name, place in found.items()}
        pairs = [
            (first, second)
            for first, second in itertools.permutations(shapes, 2)
            if len(shapes[first]) == 2 and shapes[first][1] == self.d
            and shapes[second] == (self.vocab, shapes[first][0])
        ]  # fmt: skip
        if len(shapes) != 2 or len(pairs) != 1:
            message = f"its tensors {shapes!r:.200} are not one [K, {self.d}] and one [{self.vocab}, K]"
            raise ModelFormatError(message, path=path)
        for name in pairs[0]:
            self.checkpoint.add(f"{PREDICTOR_FILE}/{name}", found[name])
        return tuple((f"{PREDICTOR_FILE}/{name}", shapes[name]) for name in pairs[0])

    def _plain(self, name: str, source: str, shape: tuple[int, ...]) -> Tensor:
        return self._tensor(name, self.float, shape, ((source + ".weight", shape),))

    def _matrix(self, name: str, source: str, shape: tuple[int, int]) -> Tensor:
        return self._tensor(name, self.type, shape, ((source + ".weight", shape),))

    def _tensor(self, name: str, type_: Any, shape: tuple[int, ...], sources: Sources) -> Tensor:
        return Tensor(name + ".weight", type_, shape, sources, self._bytes(math.prod(shape), type_))

    def _check(self, tensors: list[Tensor]) -> None:
        """Every source is there in its shape, and the checkpoint holds nothing else, before a byte is written."""
        for tensor in tensors:
            for source, shape in tensor.sources:
                self.checkpoint.check(source, shape)
            if self.imatrix is not None and tensor.type != self.float and len(tensor.shape) > 1:
                self.imatrix.check(tensor.name, len(tensor.sources), tensor.shape[-1], self.tied)
        self.checkpoint.refuse_unread((source for tensor in tensors for source, _ in tensor.sources), self.tied)


def write_tensors(
    file: PartialFile,
    path: str,
    tensors: Sequence[tuple[T, str, int]],
    pieces: Callable[[T, int], Iterator[Callable[[], None]]],
    progress: Progress,
) -> None:
    """Everything behind a GGUF header that is in the file: threads read, quantise and write, each to its own place.

    Args:
        file: what it has is the header. path: its name to be, for errors.
        tensors: (what pieces() takes, name, bytes), in the file's order.
        pieces: gives for a tensor and the byte where its data begins what writes it, piece by piece.

    Raises OSError where the disk has no room for all of it, before anything is written.
    """
    header = aligned(os.fstat(file.descriptor).st_size)
    ends = list(itertools.accumulate((aligned(size) for *_, size in tensors), initial=header))
    space = os.fstatvfs(file.descriptor)
    if ends[-1] > space.f_bavail * space.f_frsize:
        raise OSError(errno.ENOSPC, f"{ends[-1]} bytes are needed, and there is no room for them", path)
    os.ftruncate(file.descriptor, ends[-1])
    under_way: deque[Future[None]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for i, ((tensor, name, _), start) in enumerate(zip(tensors, ends, strict=False)):
                progress(i, len(tensors), name)
                for piece in pieces(tensor, start):
                    under_way.append(pool.submit(piece))
                    if len(under_way) > 2 * WORKERS:
                        under_way.popleft().result()
            while under_way:
                under_way.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    progress(len(tensors), len(tensors), "done")


def convert(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type_: str = "q4_0",
    progress: Progress | None = None,
    *,
    bundle: str | os.PathLike[str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
) -> None:
    """Writes the GGUF file of a Hugging Face checkpoint folder, or of a GGUF file of other types.

    Args:
        folder: holds config.json, tokenizer.json and model.safetensors or its shards; or a GGUF file (of a split one
            any part) with tensors of any type that the `gguf` package can read.
        target: the file to write; it appears under this name only when it is whole.
        type_: "q4_0", "q8_0" or "f16" for all matrices, the embedding included; norms and routers stay float32.
        progress: called with (tensors done, all tensors, the name in work), while a bundle is checked with layers in
            place of tensors.
        bundle: the expert bundle of the authors' engine, for a GGUF file that was left without experts.
        imatrix: importance matrix of the model in one of llama.cpp's forms, or ours with products of columns: Q4_0 is
            then rounded for the least error of outputs, see ImportanceMatrix. None: as llama.cpp rounds without one.

    Raises:
        ModelFormatError: a damaged or unsupported checkpoint, naming file and field; a bundle that fits no layout, or
            two, naming the matrix; an importance matrix that is damaged, or of another model, naming the tensor.
        SmallThinkerError: the [convert] extra is missing. ValueError: an unknown type; a bundle beside a checkpoint
            folder; an importance matrix for another type than Q4_0. OSError: such as a full disk.
    """
    if type_ not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, not {type_!r}")
    if imatrix is not None and type_ != "q4_0":
        raise ValueError("an importance matrix is for the type q4_0")
    silent: Progress = lambda done, total, name: None  # noqa: E731
    with ExitStack() as stack:
        importance = None if imatrix is None else stack.enter_context(ImportanceMatrix(imatrix))
        if os.path.isfile(folder):
            from smallthinker_edge.files.requantize import requantize

            beside = None if bundle is None else os.fspath(bundle)
            requantize(os.fspath(folder), os.fspath(target), type_.upper(), progress or silent, beside, importance)
        elif bundle is not None:
            raise ValueError("a bundle goes with a GGUF file, not with a checkpoint folder")
        else:
            Converter(os.fspath(folder), type_, importance).write(os.fspath(target), progress or silent)
