"""Checks who imports whom in the package: `make lint` runs it. Reads files, imports nothing.

A room may import what LAYERS lists for it, and the standard library and dependencies; nobody takes underscored names of
another module.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "smallthinker_edge"
# Room -> rooms and top-level modules whose modules its own may import, besides its own and LEAVES.
LEAVES = {"errors", "options"}
LAYERS = {
    "errors": set[str](),
    "options": set[str](),
    "_native": set[str](),
    "text": {"_native"},
    "machine": {"_native", "measure.limits"},
    "files": {"_native", "text"},
    "session": {"_native", "files"},
    "generation": {"_native", "text", "session"},
    "plan": {"_native", "files", "machine"},
    "opening": {"_native", "files"},
    "model": {"_native", "text", "files", "machine", "session", "generation", "plan", "opening"},
    "measure": {"_native", "files", "machine", "session", "model", "__init__"},
    "cli": {"_native", "text", "files", "machine", "session", "generation", "plan", "model", "measure", "__init__"},
    "__main__": {"cli"},
    "__init__": {"_native", "generation", "session", "model"},
}
# Cython's own imports of modules of the package; cimports stay within _native.
CYTHON_IMPORT = re.compile(rf"^\s*(?:from ({PACKAGE}[\w.]*) import (.*)|import ({PACKAGE}[\w.]*))", re.MULTILINE)


def room_of(module: str) -> str:
    """The room of a dotted module name without the package's: "files.packed" is in "files"."""
    return module.partition(".")[0] or "__init__"


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what a file imports from the package, without its name; name "" for `import module`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        for source, names, plain in CYTHON_IMPORT.findall(text):
            for name in re.findall(r"\w+", names) or [""]:
                yield (source or plain).removeprefix(PACKAGE).lstrip("."), name
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            for alias in node.names:
                yield (node.module or "").removeprefix(PACKAGE).lstrip("."), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == PACKAGE:
                    yield alias.name.removeprefix(PACKAGE).lstrip("."), ""


def faults(root: Path) -> list[str]:
    """What breaks the rules in a package folder, one line each."""
    found = []
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.pyx"), *root.rglob("*.pxd")]):
        own = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        room = room_of(own)
        if room not in LAYERS:
            found.append(f"{path}: {room} has no row in LAYERS")
            continue
        for module, name in imports(path):
            # `from smallthinker_edge.files import packed` imports a module.
            whole = (
                f"{module}.{name}".strip(".") if (root / module.replace(".", "/") / f"{name}.py").exists() else module
            )
            target = room_of(whole)
            allowed = LAYERS[room] | LEAVES | {room}
            if target not in allowed and whole not in allowed:
                found.append(f"{path}: {room} imports {whole or '__init__'}")
            if name.startswith("_") and not name.startswith("__") and name != "_native":
                found.append(f"{path}: takes {name} of {module}")
    return found


if __name__ == "__main__":
    problems = faults(Path(__file__).resolve().parents[2] / PACKAGE)
    print("\n".join(problems) or "Imports keep to their layers")
    sys.exit(bool(problems))
