"""Fixtures that several test files share. Paths only: what is in the files is each test's own business."""

from __future__ import annotations

from pathlib import Path

import gguf_files
import pytest
import shims

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_vocab() -> Path:
    """A GGUF file that holds only the Qwen2 tokenizer of 152k tokens."""
    path = ROOT.parent / "shared" / "data" / "qwen2-vocab.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there: it is too large for the repository")
    return path


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded trained model."""
    path = ROOT / "smallthinker_edge" / "data" / "demo.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer that decodes in milliseconds. Tests must not change the file."""
    return Path(gguf_files.write_model(tmp_path_factory.mktemp("models") / "tiny.gguf"))


@pytest.fixture(scope="session")
def fault_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lets calls of the system fail, to be preloaded into a process."""
    return shims.build_shim("fault_shim", tmp_path_factory.mktemp("shim"))
