"""What reads files that others made, each as a function of bytes; used by run.py and test_fuzz.py.

A target passes where the bytes are taken, or refused with a SmallThinkerError. Everything else is a finding.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import mutations
from checkpoint_files import write_checkpoint
from gguf_files import write_model

from smallthinker_edge import SmallThinker, SmallThinkerError
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.hot_experts import load_profile
from smallthinker_edge.files.imatrix import ImportanceMatrix
from smallthinker_edge.files.pack import pack, unpack
from smallthinker_edge.files.packed import verify
from smallthinker_edge.measure.imatrix import measure_importance
from smallthinker_edge.opening import plan_memory

FIXTURES = Path(__file__).parents[1] / "fixtures"
FINDINGS = FIXTURES / "fuzz"  # a folder a target
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi <|im_end|>"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "3"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ROOM = 64 << 20  # a file whose plan takes more is only planned


class Workplace:
    """A temporary folder with what the targets need besides their input."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="smallthinker-fuzz-"))
        self.input = self.folder / "input"

    def close(self) -> None:
        if "model" in self.__dict__:
            self.model.close()
        shutil.rmtree(self.folder)

    def gguf(self, name: str, **options: object) -> Path:
        small = {"n_layers": 2, "n_experts": 4, "context_length": 64}
        return Path(write_model(self.folder / f"{name}.gguf", **(small | options)))

    def packed(self, name: str, **options: object) -> Path:
        path = self.folder / f"{name}.stpk"
        pack(self.gguf(name, **options), path)
        return path

    @cached_property
    def model(self) -> SmallThinker:
        return SmallThinker(self.gguf("model", window=32, context_length=512), threads=1)

    @cached_property
    def checkpoint(self) -> Path:
        folder = self.folder / "checkpoint"
        write_checkpoint(folder, tied=False, layers=1, shards=2)
        with suppress(FileNotFoundError):
            shutil.copy(FIXTURES / "model_lm_head.pt", self.folder)
        return folder

    # Seeds: valid inputs that mutations start from.

    def gguf_seeds(self) -> Iterator[bytes]:
        yield self.gguf("tied").read_bytes()
        yield self.gguf("rich", tied=False, window=16, lm_head_profiler=32, gating="softmax",
                        fused_qkv=True).read_bytes()  # fmt: skip
        types = {"default": "Q8_0", "gate": "F16", "attn": "BF16", "embedding": "F32"}
        yield self.gguf("mixed", types=types, down_transposed=True, rope_layout=[True, False]).read_bytes()

    def packed_seeds(self) -> Iterator[bytes]:
        yield self.packed("tied").read_bytes()
        yield self.packed("untied", tied=False, window=16, lm_head_profiler=32).read_bytes()

    def session_seeds(self) -> Iterator[bytes]:
        for count in (1, 40, 300):
            with self.model.session() as session:
                session.decode([i % 256 for i in range(count)])
                session.save(self.input)
            yield self.input.read_bytes()

    def json_seeds(self) -> Iterator[bytes]:
        for path in sorted(self.checkpoint.glob("*.json")):
            yield path.name.encode() + b"\n" + path.read_bytes()
        yield b'generation_config.json\n{"bos_token_id": 300, "eos_token_id": [300, 302]}'
        yield b'chat_template.json\n{"chat_template": "{{ messages }}"}'

    def safetensors_seeds(self) -> Iterator[bytes]:
        yield next(self.checkpoint.glob("*-00001-of-*.safetensors")).read_bytes()

    def torch_seeds(self) -> Iterator[bytes]:
        yield (FIXTURES / "model_lm_head.pt").read_bytes()

    def template_seeds(self) -> Iterator[bytes]:
        for path in sorted((FIXTURES / "chat").glob("*.jinja")):
            yield path.read_bytes()

    def profile_seeds(self) -> Iterator[bytes]:
        yield json.dumps({"format": "smallthinker-hot-experts-1", "uses": [1.5] * 8}).encode()

    @cached_property
    def plain(self) -> Path:
        """What importance matrices are of: weights that are to be quantised."""
        return self.gguf("plain", types="F16", context_length=64)

    def imatrix_seeds(self) -> Iterator[bytes]:
        with SmallThinker(self.plain, threads=1) as model:
            for products in (False, True):
                measure_importance(model, [i % 256 for i in range(64)], self.input, 32, products=products)
                yield self.input.read_bytes()
        with ImportanceMatrix(self.input) as measured:
            entries = [struct.pack("<i", len(measured.entries))]
            for name, entry in measured.entries.items():
                head = struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 64, entry.squares.size)
                entries.append(head + entry.squares.astype("<f4").tobytes())
        yield b"".join(entries)

    # Targets.

    def read_gguf(self, data: bytes) -> None:
        """A model is planned, opened, and says two tokens."""
        self.input.write_bytes(data)
        plan = plan_memory(self.input)
        if plan.total - plan.process < ROOM:
            with SmallThinker(self.input, threads=1, verify=len(data) % 2 == 0) as model:
                model.generate("hello", max_tokens=2)

    def read_packed(self, data: bytes) -> None:
        """The same, and what else is done with packed files; each may refuse it."""
        for use in (lambda: verify(self.input), lambda: unpack(self.input, self.folder / "out")):
            self.input.write_bytes(data)
            with suppress(SmallThinkerError):
                use()
        self.read_gguf(data)

    def requantize(self, data: bytes) -> None:
        self.input.write_bytes(data)
        convert(self.input, self.folder / "out", "q8_0")

    def quantize_by_imatrix(self, data: bytes) -> None:
        self.input.write_bytes(data)
        convert(self.plain, self.folder / "out", "q4_0", imatrix=self.input)

    def load_session(self, data: bytes) -> None:
        self.input.write_bytes(data)
        with self.model.load_session(self.input) as session:
            session.decode([1])

    def load_profile(self, data: bytes) -> None:
        """Damaged ones are ignored."""
        self.input.write_bytes(data)
        load_profile(self.input, 8)

    def convert_with(self, name: str, data: bytes) -> None:
        """The checkpoint with one file replaced."""
        folder = self.folder / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.checkpoint, folder)
        (folder / name).write_bytes(data)
        convert(folder, self.folder / "out", "f16")

    def read_json(self, data: bytes) -> None:
        name, _, content = data.partition(b"\n")
        self.convert_with(name.decode("ascii", "ignore").strip("/.\0") or "config.json", content)

    def read_safetensors(self, data: bytes) -> None:
        self.convert_with("model-00001-of-00002.safetensors", data)

    def read_torch(self, data: bytes) -> None:
        self.convert_with("model_lm_head.pt", data)

    def render_template(self, data: bytes) -> None:
        from smallthinker_edge.text.chat import encode_chat

        template = data.decode("utf-8", "replace")
        encode_chat(self.model.tokenizer, CONVERSATION[:2], template)
        encode_chat(self.model.tokenizer, CONVERSATION, template, tools=TOOLS)


def change_json_file(draw: mutations.Random, data: bytes) -> bytes:
    name, _, content = data.partition(b"\n")
    return name + b"\n" + mutations.change_json(draw, content)


# Name: the target, its seeds, how they are changed. All are methods of a Workplace but the last.
TARGETS: dict[str, tuple[str, str, mutations.Mutation]] = {
    "gguf": ("read_gguf", "gguf_seeds", mutations.change_gguf),
    "packed": ("read_packed", "packed_seeds", mutations.change_gguf),
    "requantize": ("requantize", "gguf_seeds", mutations.change_gguf),
    "imatrix": ("quantize_by_imatrix", "imatrix_seeds", mutations.change_gguf),
    "session": ("load_session", "session_seeds", mutations.change_session),
    "profile": ("load_profile", "profile_seeds", mutations.change_json),
    "json": ("read_json", "json_seeds", change_json_file),
    "safetensors": ("read_safetensors", "safetensors_seeds", mutations.change_safetensors),
    "torch": ("read_torch", "torch_seeds", mutations.change_archive),
    "template": ("render_template", "template_seeds", mutations.change_template),
}


def run(target: Callable[[bytes], None], data: bytes) -> bool:
    """Whether the input was taken. Raises what is a finding."""
    try:
        target(data)
    except SmallThinkerError:
        return False
    return True
