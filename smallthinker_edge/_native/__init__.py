"""Cython modules: they translate types going in and errors coming out, and lead a token through the C kernels of src/.

All of them are in one shared object, so that the C core is linked once and modules share their types' code: CPython
finds a module in it by the name of its PyInit function, and the finder below tells it where to look.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from types import ModuleType


class _CoreLoader(ExtensionFileLoader):
    """Loads a module from the file of `_core`; ModuleNotFoundError where that has none of this name."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        try:
            return super().create_module(spec)
        except ImportError as problem:
            # CPython: "dynamic module does not define module export function (PyInit_NAME)". What cannot be loaded at
            # all, such as a file for another machine, stays what it is.
            if f"(PyInit_{spec.name.rpartition('.')[2]})" not in str(problem):
                raise
            raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name) from None


class _CoreFinder:
    """Finds `smallthinker_edge._native.NAME` in the file of `_core`. Asked only for what is no file of its own."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.rpartition(".")[0] != __name__:
            return None
        core = PathFinder.find_spec(f"{__name__}._core", path)
        if core is None or core.origin is None:
            return None
        return spec_from_file_location(name, core.origin, loader=_CoreLoader(name, core.origin))


sys.meta_path.append(_CoreFinder)
