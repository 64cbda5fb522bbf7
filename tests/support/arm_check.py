"""The same models and kernels on two machines: `record FOLDER` here, `compare FOLDER TABLE` on the other one.

Run by tools/arm/run_on_arm.py, natively and then under emulation; not collected by pytest. It needs the installed
package and NumPy (to record also the `gguf` package) and, to decode text, `tokenizers`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from smallthinker_edge._native import kernels

TOKENS = [5, 17, 80, 200, 33, 250, 4, 120, 99, 61, 7, 300]
# Two machines add floats in another order (attention, norms) and round expf and cos differently; the bound is relative
# to the largest logit. The recorded kernels must agree bit for bit: integer sums, and after them the same steps.
TOLERANCE = 1e-4


def model_options() -> dict[str, object]:
    """One layer with odd sizes: heads of 64, six of them for two of keys, an FFN that fills no whole tile."""
    return {
        "n_layers": 1, "d_model": 384, "n_heads": 6, "n_kv_heads": 2, "head_dim": 64, "n_experts": 8,
        "n_experts_used": 3, "d_ffn": 160, "vocab_size": 320,
    }  # fmt: skip


def logits(path: Path) -> np.ndarray:
    """Of every token, decoded as a prompt of nine and then one by one."""
    from smallthinker_edge import SmallThinker

    with SmallThinker(path, threads=2, context=256) as model, model.session() as session:
        rows = [session.decode(TOKENS[:9], all_logits=True)]
        rows += [session.decode([token])[None] for token in TOKENS[9:]]
        return np.concatenate(rows)


def integer_kernels(name: str) -> dict[str, np.ndarray]:
    """GEMMs of one and eleven tokens and a transposed down on fixed input, as bits."""
    rng = np.random.default_rng(1)
    table = kernels.Table(name)
    x = rng.standard_normal((11, 1056), np.float32)
    quantised = np.zeros((11, (1056 + 127) // 128 * kernels.Q8X4_BYTES), np.uint8)
    for row, target in zip(x, quantised, strict=True):
        table.quantize(row, target)
    result = {"quantize": quantised}
    # (type, bytes of a block, columns of a block, where its fp16 scale is, columns)
    for kind, block, width, scale, cols in ((2, 18, 32, 0, 1056), (8, 34, 32, 0, 1056), (14, 210, 256, 208, 1024)):
        blocks = 40 * cols // width
        raw = rng.integers(0, 256, (blocks, block), np.uint8)
        d = (rng.random(blocks).astype(np.float16) - np.float16(0.5)).view(np.uint8).reshape(-1, 2)
        raw[:, scale : scale + 2] = d
        packed = kernels.pack_tile16(kind, raw.reshape(-1), 40, cols)
        for n in (1, 11):
            y = np.zeros(n * 40, np.float32)
            table.gemm(kind, packed, 40, cols, 0, 3, quantised[:n], y, 40)
            result[f"gemm {kind} {n}"] = y.view(np.uint32)
            if kind == 2:
                down = kernels.pack_down(kind, raw[: 64 * 11].reshape(-1), 352, 64, True)
    y = np.zeros(384, np.float32)
    fired = np.array([kernels.multiply(row[:32], row[32:64]) for row in x[:2]], kernels.FIRED)
    table.down_transposed(2, down, 352, 64, 0, 3, fired, 0.3, y)
    return result | {"down transposed": y.view(np.uint32)}


def record(folder: Path) -> None:
    import gguf_files

    from smallthinker_edge.files.pack import pack

    gguf_files.write_model(folder / "one.gguf", **model_options())
    pack(folder / "one.gguf", folder / "one.stpk")
    np.save(folder / "logits.npy", logits(folder / "one.stpk"))
    (folder / "demo.txt").write_text(demo_answers(), encoding="utf-8")
    fused = next(name for name in kernels.tables() if name != "ref")
    np.savez(folder / "fused.npz", **integer_kernels(fused))
    np.savez(folder / "ref.npz", **integer_kernels("ref"))


def compare(folder: Path, table: str) -> None:
    chosen = kernels.tables()[0]
    assert chosen == table, f"this CPU model should choose {table}, not {chosen}"
    for name in kernels.tables():
        with np.load(folder / ("ref.npz" if name == "ref" else "fused.npz")) as expected:
            for key, value in integer_kernels(name).items():
                assert np.array_equal(value, expected[key]), f"{name}: {key} differs in its bits"
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        print(f"{table}: kernels agree bit for bit (no tokenizers here: no model decoded)")
        return
    expected = np.load(folder / "logits.npy")
    difference = np.abs(logits(folder / "one.stpk") - expected).max() / np.abs(expected).max()
    assert difference <= TOLERANCE, f"logits differ by {difference:.2g} of the largest"
    answers, recorded = demo_answers(), (folder / "demo.txt").read_text(encoding="utf-8")
    assert answers == recorded, f"the demo model says {answers!r} here, {recorded!r} there"
    print(f"{table}: kernels agree bit for bit, logits to {difference:.1e} of the largest, the demo's answers in full")


def demo_answers() -> str:
    """What the embedded model makes of the demo's first two sentences, greedy."""
    from smallthinker_edge.cli import demo
    from smallthinker_edge.home.understand import HomeModel, open_home_model

    with open_home_model(threads=2) as model:
        home_model = HomeModel(model, constrained=False)
        return "\n".join(str(home_model.answer(one.sentence)) for one in demo.load_sentences(demo.SENTENCES)[:2])


def main() -> None:
    command, folder, *rest = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    if command == "record":
        record(Path(folder))
    else:
        compare(Path(folder), rest[0])


if __name__ == "__main__":
    main()
