"""Cross-compiles the wheels: manylinux and musllinux for x86_64 and aarch64, and armv7l. Needs no Docker.

Run by `make wheels` and, for one platform, by tools/arm/run_on_arm.py. One wheel per platform serves CPython 3.11 and
later (stable ABI) and holds all kernel tables of its architecture. CPython 3.10, whose stable ABI lacks the buffer
protocol, gets wheels of its own where it is named: --python python3.10. The compiler is clang from the `ziglang`
package of PyPI, which brings the C libraries of every target; headers are those of the Python that runs this, or of
the one named. It never touches the working tree: a copy of the sources is built.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from platform import libc_ver, machine

ROOT = Path(__file__).resolve().parents[2]

# Wheel platform: (zig's target, what Python calls the platform). 2.28 is Debian 10, RHEL 8; 2.31 is the oldest glibc
# that auditwheel knows for armv7l (Debian 11, piwheels' oldest).
PLATFORMS = {
    "manylinux_2_28_x86_64": ("x86_64-linux-gnu.2.28", "linux-x86_64"),
    "manylinux_2_28_aarch64": ("aarch64-linux-gnu.2.28", "linux-aarch64"),
    "musllinux_1_2_x86_64": ("x86_64-linux-musl", "linux-x86_64"),
    "musllinux_1_2_aarch64": ("aarch64-linux-musl", "linux-aarch64"),
    "manylinux_2_31_armv7l": ("arm-linux-gnueabihf.2.31", "linux-armv7l"),
}

# What can be built from this machine's pyconfig.h, without the stable ABI.
ALONE = ("manylinux_2_28_x86_64", "manylinux_2_28_aarch64")

# Python.h asks its pyconfig.h for little once the stable ABI is chosen: the sizes of types, which the compiler knows
# for its own target, and, as the real one on Linux does, all that the C library declares. (The building machine's
# pyconfig.h would state the building machine's.)
PYCONFIG = """\
#define _GNU_SOURCE 1
#define SIZEOF_INT __SIZEOF_INT__
#define SIZEOF_LONG __SIZEOF_LONG__
#define SIZEOF_LONG_LONG __SIZEOF_LONG_LONG__
#define SIZEOF_SHORT __SIZEOF_SHORT__
#define SIZEOF_FLOAT __SIZEOF_FLOAT__
#define SIZEOF_DOUBLE __SIZEOF_DOUBLE__
#define SIZEOF_VOID_P __SIZEOF_POINTER__
#define SIZEOF_UINTPTR_T __SIZEOF_POINTER__
#define SIZEOF_SIZE_T __SIZEOF_SIZE_T__
#define SIZEOF_WCHAR_T __SIZEOF_WCHAR_T__
#define SIZEOF_TIME_T __SIZEOF_LONG__
#define SIZEOF_OFF_T 8
#define HAVE_LONG_LONG 1
#define HAVE_STDARG_PROTOTYPES 1
#define HAVE_STDINT_H 1
#define HAVE_INTTYPES_H 1
#define HAVE_UNISTD_H 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_SYS_TIME_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_SSIZE_T 1
#define HAVE_UINTPTR_T 1
#define HAVE_PTHREAD_H 1
#define HAVE_DYNAMIC_LOADING 1
#define WITH_THREAD 1
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python that wheels are built with, its version as in cp310, and whether they use the stable ABI."""

    executable: str
    version: str
    stable: bool


def interpreter(name: str | None, build: Path) -> Interpreter:
    """This Python for stable-ABI wheels, or an environment of another one, made once, with what setup.py needs."""
    if name is None:
        return Interpreter(sys.executable, "cp311", True)
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found")
    version = subprocess.run(
        [found, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"], check=True, capture_output=True, text=True
    ).stdout.strip()
    venv = build / version
    if not (venv / "complete").exists():
        subprocess.run([found, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [str(venv / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, "setuptools>=77.0.3", "cython>=3.0", "wheel"], check=True)
        (venv / "complete").touch()
    return Interpreter(str(venv / "bin/python"), version, False)


def target_headers(build: Path, python: Interpreter) -> Path:
    """A copy of the Python's headers; for the stable ABI with a pyconfig.h that fits every target.

    Without it the building machine's own pyconfig.h stays, which fits a target with its sizes of types and C library.
    """
    headers = build / f"include-{python.version}"
    command = [python.executable, "-c", "import sysconfig; print(sysconfig.get_paths()['include'])"]
    source = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    shutil.copytree(source, headers, dirs_exist_ok=True)
    if not python.stable:
        return headers
    (headers / "pyconfig.h").unlink(missing_ok=True)
    (headers / "pyconfig.h").write_text(PYCONFIG)
    return headers


def copy_sources(build: Path) -> Path:
    """The files that git knows or would add, in a folder of their own."""
    tree = build / "src"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    wanted = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    for name in wanted:
        target = tree / name
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    for old in [path for path in tree.rglob("*") if path.is_file() and path.suffix in (".c", ".h", ".pyx", ".py")]:
        name = str(old.relative_to(tree))
        if name not in wanted and not name.startswith(("smallthinker_edge/_native/", "build")):
            old.unlink()
    return tree


def build_wheel(platform: str, python: Interpreter, build: Path, out: Path, demo: bool) -> Path:
    """Builds one wheel into `out` and returns its path. Raises CalledProcessError with the compiler's message."""
    target, python_platform = PLATFORMS[platform]
    tree, headers = copy_sources(build), target_headers(build, python)
    compiler = f"{sys.executable} {ROOT / 'tools' / 'build' / 'zig_cc.py'} {target}"
    environment = {
        **os.environ,
        "SMALLTHINKER_ABI3": "1" if python.stable else "0",
        "_PYTHON_HOST_PLATFORM": python_platform,
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared -s",
        "CFLAGS": "-fPIC",
    }
    if not python.stable:  # setuptools would name the modules for the building machine
        suffix = f".cpython-{python.version[2:]}-{python_platform.removeprefix('linux-')}-linux-gnu.so"
        environment["SETUPTOOLS_EXT_SUFFIX"] = suffix
    if demo is False:
        (tree / "smallthinker_edge" / "data" / "demo.gguf").unlink(missing_ok=True)
    base = build / (platform if python.stable else f"{platform}-{python.version}")
    dist = base / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    shutil.rmtree(base / "lib", ignore_errors=True)
    command = [
        *(python.executable, "setup.py", "--quiet"),
        *("build", "--build-base", str(base), "--build-lib", str(base / "lib")),
        *("build_ext", f"--include-dirs={headers}"),
        *("bdist_wheel", "--plat-name", platform, "--dist-dir", str(dist), "--bdist-dir", str(base / "bdist")),
    ]
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(wheel, out / wheel.name))


def audit(wheel: Path) -> None:
    """Checks the wheel's symbols against its tags: the C library's versions, and Python's stable ABI.

    auditwheel can judge a musl wheel only on a system with musl: it looks for the libraries that the wheel names.
    """
    tools = [] if "musllinux" in wheel.name else [[sys.executable, "-m", "auditwheel", "show", str(wheel)]]
    if "-abi3-" in wheel.name:
        tools.append([sys.executable, "-m", "abi3audit", str(wheel)])
    for command in tools:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        name = command[2]
        if result.returncode != 0:
            raise SystemExit(f"{name} refuses {wheel.name}:\n{result.stdout}{result.stderr}")
        platform = wheel.stem.split("-")[-1]
        if name == "auditwheel" and platform not in result.stdout.replace("\n", " "):
            raise SystemExit(f"auditwheel finds {wheel.name} fit for another platform only:\n{result.stdout}")


def try_here(wheel: Path, python: str, build: Path) -> None:
    """Runs a wheel for this machine in a clean environment, with no compiler on the PATH.

    doctor and demo must work, and the kernel table chosen, its results and a packed model's logits must be those of
    the package that is installed beside this script, which another compiler built (tests/support/arm_check.py).
    """
    venv, expected = build / "try", build / "expected"
    shutil.rmtree(venv, ignore_errors=True)
    expected.mkdir(exist_ok=True)
    check = ROOT / "tests/support/arm_check.py"
    subprocess.run([sys.executable, str(check), "record", str(expected)], check=True)
    best = "from smallthinker_edge._native import kernels; print(kernels.tables()[0])"
    table = subprocess.run([sys.executable, "-c", best], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PATH"] = str(venv / "bin")
    subprocess.run([*pip, "--only-binary=:all:", str(wheel.resolve())], check=True, env=environment, cwd=venv)
    program = str(venv / "bin/smallthinker-edge")
    compare = [str(venv / "bin/python"), str(check), "compare", str(expected), table]
    for command in ([program, "doctor", str(venv)], [program, "demo"], compare):
        result = subprocess.run(command, env=environment, cwd=venv, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(f"{wheel.name} in {python} fails at {command[1]}:\n{result.stdout}{result.stderr}")
    print(f"{wheel.name} in {python}, without a compiler on the PATH: {result.stdout}", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", action="append", choices=PLATFORMS, help="may be repeated (default: all)")
    parser.add_argument("--python", help="build for this Python alone, without the stable ABI (glibc, 64 bits)")
    help_try = "Pythons to try the wheel for this machine in (default: the one it is built with)"
    parser.add_argument("--try", action="append", default=[], dest="pythons", metavar="PYTHON", help=help_try)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheels (default: dist)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "wheels", help="folder for what is in between")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo model out")
    parser.add_argument("--no-audit", action="store_true", help="skip auditwheel and abi3audit")
    arguments = parser.parse_args()
    build = arguments.build.resolve()
    python = interpreter(arguments.python, build)
    platforms = arguments.platform or (PLATFORMS if python.stable else ALONE)
    if not python.stable and not set(platforms) <= set(ALONE):
        raise SystemExit(f"--python builds for {' and '.join(ALONE)} only")
    for platform in platforms:
        try:
            wheel = build_wheel(platform, python, build, arguments.out, not arguments.no_demo)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{platform} does not build:\n{error.stderr.decode(errors='replace')[-4000:]}") from None
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
        if not arguments.no_audit:
            audit(wheel)
            if platform == f"manylinux_2_28_{machine()}" and libc_ver()[0] == "glibc":
                for tried in arguments.pythons or [python.executable]:
                    try_here(wheel, tried, build)


if __name__ == "__main__":
    main()
