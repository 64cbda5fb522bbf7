"""Records logits that llama.cpp computes for a GGUF file, as fixtures for the tests (an independent judge).

Run by hand in a Python that has `llama-cpp-python` and `gguf`; the tests only read what it wrote. It never
imports this library.

    python tools/models/record_golden.py MODEL.gguf --prompts FILE -o OUT.npz     # FILE: lines of text, or JSON
    python tools/models/record_golden.py --fixtures tests/fixtures/golden         # remakes the random models too

OUT.npz holds for prompt i: `tokens_i` int32 [n], `first_i` (position of the first recorded row) and
`logits_i` float16 [n - first_i, V]; and `provenance`, a JSON text with the model's sha256 and llama.cpp's
version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/support"))

import gguf_files
import reference

ROUTING_MARGIN = 0.03  # standard deviations of the router logits
TAIL = 64
WINDOW = 4096  # llama.cpp uses this window whatever the file says

# Small models that between them use every option llama.cpp and FORMATS section 4 share.
FIXTURES: dict[str, dict[str, Any]] = {
    # Full layers without positions, window layers with RoPE, tied, sigmoid: the 21B's layout.
    "random": {
        "n_layers": 5, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "n_experts": 8,
        "n_experts_used": 2, "d_ffn": 32, "vocab_size": 320, "window": WINDOW, "context_length": 8192,
        "seed": 11, "types": "Q4_0",
    },
    # RoPE everywhere, softmax, untied, odd head count, the other tensor types, fused q, k, v.
    "mixed": {
        "n_layers": 2, "d_model": 256, "n_heads": 3, "n_kv_heads": 1, "head_dim": 32, "n_experts": 4,
        "n_experts_used": 3, "d_ffn": 32, "vocab_size": 288, "tied": False, "gating": "softmax", "seed": 12,
        "fused_qkv": True,
        "types": {
            "default": "Q4_0", "gate": "F16", "up": "Q8_0", "down": "Q4_1", "head": "Q6_K",
            "embedding": "Q8_0",
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Tokens to run and how many of the last positions to record (0: all)."""

    tokens: list[int]
    text: str | None = None
    last: int = 0


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Judge:
    """A model in llama.cpp with an F16 KV cache and plain (not flash) attention on one thread."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=True,
            flash_attn=False, verbose=False,
        )  # fmt: skip

    def tokenize(self, text: str) -> list[int]:
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [tokens, V]."""
        self.llama.reset()
        self.llama.eval(tokens)
        return np.array(self.llama.scores[: len(tokens)])


def read_prompts(path: Path, last: int) -> list[Prompt]:
    """A JSON list of texts and token lists, or a text file with one prompt a line."""
    if path.suffix == ".json":
        items = json.loads(path.read_text(encoding="utf-8"))
    else:
        items = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Prompt([], item, last) if isinstance(item, str) else Prompt(item, None, last) for item in items]


def pad_four_layers(model: Path, folder: Path) -> Path:
    """The model itself, or a copy with a fifth, silent layer where llama.cpp would misread the file.

    llama.cpp takes a model whose number of layers equals its NoPE period, 4, for one with RoPE on every
    layer. In the copy the last layer is repeated with zeros for attn_output and ffn_down_exps, so that a
    correct program computes the same logits for both files.
    """
    reader = gguf.GGUFReader(model)
    layers = reader.get_field("smallthinker.block_count")
    window = reader.get_field("smallthinker.attention.sliding_window")
    if layers is None or layers.contents() != 4 or window is None:
        return model
    copy = folder / model.name
    writer = gguf.GGUFWriter(copy, "smallthinker")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = 5 if key == "smallthinker.block_count" else field.contents()
        item_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, value, field.types[0], item_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.3."):
            silent = "attn_output" in tensor.name or "ffn_down_exps" in tensor.name
            data = np.zeros_like(tensor.data) if silent else tensor.data
            writer.add_tensor("blk.4." + tensor.name[6:], data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def calm_tensors(options: dict[str, Any]) -> dict[str, tuple[np.ndarray, str]]:
    """Replacements that let the token's own embedding dominate the residual, as it does in trained models.

    Otherwise a rounding difference grows from layer to layer until every later routing decision is a toss-up.
    The output norm keeps the logits at a useful width; its signs keep a tied head from repeating the token.
    """
    rng = np.random.default_rng(options["seed"])
    vocab_size, d_model = options["vocab_size"], options["d_model"]
    embedding = rng.standard_normal((vocab_size, d_model)).astype(np.float32)
    norm = np.ones(d_model, np.float32)
    kind = options["types"]
    if options.get("tied", True):
        norm = (rng.choice([-1, 1], d_model) * rng.uniform(1.5, 3, d_model) / np.sqrt(d_model)).astype(np.float32)
    return {
        "token_embd.weight": (embedding, kind if isinstance(kind, str) else kind["embedding"]),
        "output_norm.weight": (norm, "F32"),
    }


class RoutingMargins(reference.Reference):
    """The reference model, noting how clearly each token was routed."""

    def margins(self, tokens: list[int]) -> np.ndarray:
        """[n]: the smallest gap, over layers, between the last chosen and the first refused expert.

        In units of the standard deviation of that layer's router logits.
        """
        self.smallest = np.full(len(tokens), np.inf)
        self.run(tokens)
        return self.smallest

    def route(self, x: Any, layer: int) -> Any:
        logits = x @ self.weights[f"blk.{layer}.ffn_gate_inp.weight"].T
        ordered = -np.sort(-logits, axis=1)
        used = self.params.n_experts_used
        gap = (ordered[:, used - 1] - ordered[:, used]) / logits.std()
        self.smallest = np.minimum(self.smallest, gap)
        return super().route(x, layer)


def clear_prompt(model: RoutingMargins, vocab_size: int, n: int, rng: np.random.Generator) -> list[int]:
    """Random tokens of which none is routed by a margin that rounding could overturn.

    Of a long prompt only the last TAIL tokens: one token among thousands hardly moves attention.
    Two correct programs that round differently may route a close call differently and disagree from there.
    """
    tokens = rng.integers(0, vocab_size, n)
    for _ in range(100):
        close = model.margins(tokens.tolist()) < ROUTING_MARGIN
        close[:-TAIL] = False
        if not close.any():
            break
        tokens[close] = rng.integers(0, vocab_size, int(close.sum()))
    else:
        raise ValueError("no sequence without close routing decisions found")
    return [int(token) for token in tokens]


def record(model: Path, prompts: list[Prompt], output: Path, context: int, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        judged = pad_four_layers(model, Path(folder))
        judge = Judge(judged, context, threads)
    arrays: dict[str, np.ndarray] = {}
    for index, prompt in enumerate(prompts):
        tokens = prompt.tokens or judge.tokenize(prompt.text or "")
        if not 0 < len(tokens) <= context:
            raise ValueError(f"prompt {index} has {len(tokens)} tokens, 1 to {context} possible")
        first = max(0, len(tokens) - prompt.last) if prompt.last else 0
        logits = judge.logits(tokens)[first:]
        if not np.isfinite(logits).all():
            raise ValueError(f"prompt {index}: llama.cpp gave logits that are not finite")
        arrays[f"tokens_{index}"] = np.array(tokens, np.int32)
        arrays[f"first_{index}"] = np.array(first)
        arrays[f"logits_{index}"] = logits.astype(np.float16)
    provenance = {
        "model": model.name,
        "sha256": sha256(model),
        "llama_cpp_python": llama_cpp.__version__,
        "system_info": llama_cpp.llama_print_system_info().decode(),
        "settings": {"threads": threads, "context": context, "kv": "F16", "flash_attention": False},
        "padded_with_silent_layer": judged != model,
        "prompts": len(prompts),
        "texts": [prompt.text for prompt in prompts],
    }
    arrays["provenance"] = np.array(json.dumps(provenance))
    np.savez_compressed(output, **arrays)  # type: ignore[arg-type]
    print(f"{output}: {len(prompts)} prompts, {output.stat().st_size} bytes")


def record_fixtures(folder: Path, threads: int) -> None:
    """Writes NAME.gguf and NAME.npz for every model of FIXTURES."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in FIXTURES.items():
        model = folder / f"{name}.gguf"
        gguf_files.write_model(model, **options, replace_tensors=calm_tensors(options))
        lengths = [(64, 0), (1, 0), (300, 16)]
        if options.get("window"):
            lengths.append((WINDOW + 64, 16))
        rng, margins = np.random.default_rng(1), RoutingMargins.from_gguf(model)
        prompts = [Prompt(clear_prompt(margins, options["vocab_size"], n, rng), None, last) for n, last in lengths]
        context = max(512, -(-max(n for n, _ in lengths) // 256) * 256)
        record(model, prompts, folder / f"{name}.npz", context, threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="lines of text, or a JSON list")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.npz")
    parser.add_argument("--last", type=int, default=0, help="record only the last positions (default: all)")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fixtures", type=Path, metavar="DIR", help="remake the random models and theirs")
    args = parser.parse_args()
    if args.fixtures:
        record_fixtures(args.fixtures, args.threads)
        return 0
    if not (args.model and args.prompts and args.output):
        parser.error("MODEL, --prompts and -o are needed, or --fixtures")
    try:
        record(args.model, read_prompts(args.prompts, args.last), args.output, args.context, args.threads)
    except (ValueError, OSError) as error:
        print(f"record_golden: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
