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
LEAVES = {"errors", "options", "printable"}
LAYERS = {
    "errors": set[str](),
    "options": set[str](),
    "printable": set[str](),
    "_native": set[str](),
    "text": {"_native"},
    "machine": {"_native", "measure.limits"},
    "files": {"_native", "text"},
    "session": {"_native", "files"},
    "generation": {"_native", "text", "session", "files.session_file"},
    "completions": {"text", "generation"},
    "plan": {"_native", "files", "machine"},
    "loading": {"_native", "files"},
    "opening": {"_native", "text", "files", "machine", "plan", "loading"},
    "model": {"_native", "text", "files", "machine", "session", "generation", "completions", "plan", "opening"},
    "measure": {"_native", "files", "machine", "session", "opening", "model", "__init__"},
    "batch": {"text", "files", "machine", "completions", "model"},
    "server": {"completions", "model"},
    "home": {"completions", "model"},
    "cli": {
        "_native",
        "text",
        "files",
        "machine",
        "session",
        "generation",
        "plan",
        "opening",
        "model",
        "measure",
        "batch",
        "server",
        "home",
        "__init__",
    },
    "__main__": {"cli"},
    "__init__": {"_native", "generation", "session", "model"},
}
STUBS = {"files.config"}  # whose types the stubs of _native may name, which never run
# Cython's own imports of modules of the package; cimports stay within _native.
CYTHON_IMPORT = re.compile(rf"^\s*(?:from ({PACKAGE}[\w.]*|\.+[\w.]*) import (.*)|import (.*))", re.MULTILINE)


def room_of(module: str) -> str:
    """The room of a dotted module name without the package's: "files.packed" is in "files"."""
    return module.partition(".")[0] or "__init__"


def absolute(source: str, folder: Path) -> str | None:
    """The module that "package.a.b", or "..b" in a file of that folder of the package, names: "a.b"; None of others."""
    level = len(source) - len(source.lstrip("."))
    if level:
        above = folder.parts[: len(folder.parts) - level + 1]
        return ".".join((*above, source[level:])).strip(".")
    head, _, rest = source.partition(".")
    return rest if head == PACKAGE else None


def imports(path: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    """(module, name, as) of what a file imports from the package, without its name; name "" for `import module`.

    folder: where the file is in the package. as: what stands for it in the file, "" where that is not known.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".pyx", ".pxd"):
        for source, names, plain in CYTHON_IMPORT.findall(text):
            # `import a, b as c` names several modules; `from a import b, c` several names of one.
            for whole in [source] if source else re.findall(r"(?:^|,)\s*([\w.]+)", plain.partition("#")[0]):
                module = absolute(whole, folder)
                if module is not None:
                    for name in re.findall(r"\w+", names) or [""]:
                        yield module, name, ""
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = absolute("." * node.level + (node.module or ""), folder)
            if module is not None:
                for alias in node.names:
                    yield module, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module = absolute(alias.name, folder)
                if module is not None:
                    yield module, "", alias.asname or alias.name


def hidden(name: str) -> bool:
    """It belongs to the module that defines it."""
    return name.startswith("_") and not name.startswith("__") and name != "_native"


def attributes(path: Path) -> Iterator[tuple[str, str]]:
    """("a.b", "_c") of each a.b._c in a Python file."""
    if path.suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and hidden(node.attr):
                yield ast.unparse(node.value), node.attr


def faults(root: Path) -> list[str]:
    """What breaks the rules in a package folder, one line each."""
    found = []
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".pyi", ".pyx", ".pxd")):
        own = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        room = room_of(own)
        if room not in LAYERS:
            found.append(f"{path}: {room} has no row in LAYERS")
            continue
        modules = {}
        for module, name, known_as in imports(path, path.relative_to(root).parent):
            # `from smallthinker_edge.files import packed` imports a module.
            whole = (
                f"{module}.{name}".strip(".") if (root / module.replace(".", "/") / f"{name}.py").exists() else module
            )
            target = room_of(whole)
            allowed = LAYERS[room] | LEAVES | {room} | (STUBS if path.suffix == ".pyi" else set())
            if target not in allowed and whole not in allowed:
                found.append(f"{path}: {room} imports {whole or '__init__'}")
            if hidden(name):
                found.append(f"{path}: takes {name} of {module}")
            if not name or whole != module:
                modules[known_as] = whole
        for owner, name in attributes(path):
            if owner in modules:
                found.append(f"{path}: takes {name} of {modules[owner]}")
    return found


if __name__ == "__main__":
    problems = faults(Path(__file__).resolve().parents[2] / PACKAGE)
    print("\n".join(problems) or "Imports keep to their layers")
    sys.exit(bool(problems))
