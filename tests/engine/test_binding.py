"""The one shared object of all Cython modules, as the import system sees it."""

from __future__ import annotations

import importlib

import pytest

from smallthinker_edge._native import engine, layouts


def test_all_modules_are_in_one_file() -> None:
    assert engine.__file__ == layouts.__file__
    assert "_core" in str(engine.__file__)


def test_a_module_that_does_not_exist_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'smallthinker_edge\._native\.nope'") as caught:
        importlib.import_module("smallthinker_edge._native.nope")
    assert caught.value.name == "smallthinker_edge._native.nope"
