"""tools/models/make_synthetic.py: the files load, have the shapes asked for, and behave as they are calibrated to.

The behaviour is measured by the NumPy reference on tokens that the tool has not seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from reference import Reference

from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import GGUFFile

TOOL = Path(__file__).resolve().parents[2] / "tools" / "models" / "make_synthetic.py"
EXPERTS, USED, LAYERS, HOT = 32, 4, 3, 7
SHAPE = ["--layers", LAYERS, "--d-model", 256, "--experts", EXPERTS, "--experts-used", USED, "--d-ffn", 64]
SHAPE += ["--heads", 4, "--kv-heads", 2, "--head-dim", 32]


def make(path: Path, *options: Any, preset: str = "custom") -> Path:
    command = [sys.executable, str(TOOL), preset, "-o", str(path), *map(str, options)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return path


class Observer(Reference):
    """The reference model, keeping the share of silent neurons among the chosen experts of each layer."""

    silent: list[float]

    def observe(self, n: int = 384) -> tuple[np.ndarray, np.ndarray]:
        """(use [layers, E]: share of tokens that use an expert, most used first; silent [layers])."""
        self.silent = []
        trace = self.run(np.random.default_rng(99).integers(0, 320, n).tolist())
        assert np.isfinite(trace.logits).all()
        use = [np.bincount(chosen.ravel(), minlength=EXPERTS) / n for chosen in trace.chosen]
        return -np.sort(-np.array(use), axis=1), np.array(self.silent)

    def experts(self, h: Any, layer: int, chosen: Any, weights: Any) -> Any:
        gate = self.weights[f"blk.{layer}.ffn_gate_exps.weight"]
        self.silent.append(float(np.mean([(gate[e] @ h[t] <= 0).mean() for t in range(len(h)) for e in chosen[t]])))
        return super().experts(h, layer, chosen, weights)


@pytest.fixture(scope="module")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    return make(folder / "model.gguf", *SHAPE, "--stats", folder / "stats.json")


def test_neurons_are_silent_as_often_as_asked(default_model: Path) -> None:
    _, silent = Observer.from_gguf(default_model).observe()
    assert silent == pytest.approx([0.62] * LAYERS, abs=0.02)


def test_other_share_of_silent_neurons(tmp_path: Path) -> None:
    path = make(tmp_path / "model.gguf", *SHAPE, "--silent", 0.9, "--sample", 128)
    _, silent = Observer.from_gguf(path).observe(128)
    assert silent == pytest.approx([0.9] * LAYERS, abs=0.02)


def test_first_tenth_of_the_layers_is_more_silent(tmp_path: Path) -> None:
    path = make(tmp_path / "model.gguf", *SHAPE, "--layers", 10, "--sample", 64)
    _, silent = Observer.from_gguf(path).observe(64)
    assert silent == pytest.approx([0.93] + [0.62] * 9, abs=0.03)


def test_a_few_experts_are_hot(default_model: Path) -> None:
    use, _ = Observer.from_gguf(default_model).observe()
    assert use[:, :HOT].mean() == pytest.approx(0.45, abs=0.04)
    assert use[:, HOT:].mean() == pytest.approx(0.034, abs=0.012)
    assert use[:, HOT - 1].min() > 2 * use[:, HOT].max()  # two groups, not a slope


def test_easy_style_uses_hot_experts_more(default_model: Path, tmp_path: Path) -> None:
    easy = make(tmp_path / "easy.gguf", *SHAPE, "--style", "easy", "--sample", 128)
    hot_use = Observer.from_gguf(easy).observe()[0][:, :HOT].mean()
    assert hot_use > Observer.from_gguf(default_model).observe()[0][:, :HOT].mean() + 0.02


def test_reported_statistics_are_those_of_the_file(default_model: Path) -> None:
    stats = json.loads((default_model.parent / "stats.json").read_text())
    use, silent = Observer.from_gguf(default_model).observe()
    assert stats["hot_experts"] == HOT
    assert stats["silent"] == pytest.approx(silent.mean(), abs=0.02)
    assert stats["hot_use"] == pytest.approx(use[:, :HOT].mean(), abs=0.04)
    assert len(stats["layers"]) == LAYERS


def test_constant_channels_stay_constant_through_the_layers(default_model: Path) -> None:
    model = Observer.from_gguf(default_model)
    seen = []

    class Watch(Reference):
        def route(self, x: Any, layer: int) -> Any:
            seen.append(x[:, :32])
            return super().route(x, layer)

    Watch(model.params, model.weights).run([1, 2, 3, 250])
    assert len(seen) == LAYERS
    for channels in seen:
        assert np.ptp(channels) == 0
        assert channels[0, 0] == pytest.approx(0.1, rel=1e-3)


def test_transposed_down_keeps_the_statistics(tmp_path: Path) -> None:
    path = make(tmp_path / "model.gguf", *SHAPE, "--down", "transposed", "--sample", 128)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.0.ffn_down_exps.weight"].shape.tolist() == [256, 64, EXPERTS]
    _, silent = Observer.from_gguf(path).observe(128)
    assert silent == pytest.approx([0.62] * LAYERS, abs=0.03)


def test_same_seed_same_file(tmp_path: Path) -> None:
    first = make(tmp_path / "a.gguf", "--layers", 1, "--sample", 16).read_bytes()
    assert make(tmp_path / "b.gguf", "--layers", 1, "--sample", 16).read_bytes() == first
    assert make(tmp_path / "c.gguf", "--layers", 1, "--sample", 16, "--seed", 1).read_bytes() != first


def test_header_is_read_by_the_library(default_model: Path) -> None:
    with GGUFFile(default_model) as file:
        config = ModelConfig.from_gguf(file)
    assert (config.n_layers, config.d_model, config.n_experts, config.n_experts_used) == (LAYERS, 256, EXPERTS, USED)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.d_ffn) == (4, 2, 32, 64)
    assert (config.vocab_size, config.tied, config.gating, config.window) == (320, True, "sigmoid", 0)
    assert all(config.rope_layout)


def test_hybrid_untied_softmax_model(tmp_path: Path) -> None:
    options = ["--layers", 5, "--hybrid", "--window", 48, "--no-tied", "--gating", "softmax", "--head", "q6_k"]
    path = make(tmp_path / "model.gguf", *options, "--sample", 64)
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        assert file.tensors["output.weight"].type == "Q6_K"
    assert config.window_layout == config.rope_layout == (False, True, True, True, False)
    assert (config.window, config.tied, config.gating) == (48, False, "softmax")
    assert np.isfinite(Reference.from_gguf(path).logits(list(range(80)))).all()


def test_softmax_gating_keeps_the_statistics(tmp_path: Path) -> None:
    options = ["--gating", "softmax", "--no-tied", "--hybrid", "--window", 48, "--layers", 4, "--sample", 128]
    use, silent = Observer.from_gguf(make(tmp_path / "model.gguf", *SHAPE, *options)).observe()
    assert silent == pytest.approx([0.62] * 4, abs=0.03)
    assert use[:, :HOT].mean() == pytest.approx(0.45, abs=0.05)
    assert use[:, HOT - 1].min() > 2 * use[:, HOT].max()


def test_tied_q6_k_embedding_keeps_the_statistics(tmp_path: Path) -> None:
    path = make(tmp_path / "model.gguf", *SHAPE, "--head", "q6_k", "--sample", 128)
    use, silent = Observer.from_gguf(path).observe()
    assert silent == pytest.approx([0.62] * LAYERS, abs=0.03)
    assert use[:, :HOT].mean() == pytest.approx(0.45, abs=0.05)


@pytest.mark.parametrize("preset", ["4b", "21b"])
def test_presets_have_the_real_shapes(preset: str, tmp_path: Path) -> None:
    narrow = ["--layers", 1, "--experts", 4, "--experts-used", 2, "--vocab-size", 288, "--sample", 8]
    with GGUFFile(make(tmp_path / "model.gguf", *narrow, preset=preset)) as file:
        config = ModelConfig.from_gguf(file)
    heads = (config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ffn)
    assert heads == {"4b": (1536, 12, 2, 128, 768), "21b": (2560, 28, 4, 128, 768)}[preset]
    assert (config.tied, config.gating) == {"4b": (True, "sigmoid"), "21b": (False, "softmax")}[preset]
    assert config.context_length == {"4b": 32768, "21b": 16384}[preset]
    assert config.rope_theta == pytest.approx(1.5e6)


def test_tokenizer_is_copied_from_the_vocabulary_file(shared_vocab: Path, tmp_path: Path) -> None:
    options = ["--layers", 1, "--d-model", 64, "--d-ffn", 32, "--vocab-size", 151936, "--sample", 16]
    with (
        GGUFFile(make(tmp_path / "model.gguf", *options, "--vocab", shared_vocab)) as file,
        GGUFFile(shared_vocab) as v,
    ):
        copied = {key: value for key, value in v.metadata.items() if key.startswith("tokenizer.")}
        assert copied.items() <= file.metadata.items()
        assert ModelConfig.from_gguf(file).vocab_size == 151936


def test_impossible_shapes_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    for options in (["--d-model", 100], ["--experts-used", 99], ["--kv-heads", 3], ["--vocab-size", 10]):
        with pytest.raises(subprocess.CalledProcessError) as failure:
            make(target, *options)
        assert "make_synthetic:" in failure.value.stderr
    assert list(tmp_path.iterdir()) == []


def test_logits_do_not_repeat_the_last_token(default_model: Path) -> None:
    model = Reference.from_gguf(default_model)
    tokens = np.random.default_rng(5).integers(0, 320, 64)
    assert (model.logits(tokens.tolist()).argmax(axis=1) == tokens).mean() < 0.2
