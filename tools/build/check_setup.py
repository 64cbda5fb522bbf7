"""Says what is missing on this machine before `make` sets up .venv: Python 3.10, venv, a C compiler, headers.

Called by the Makefile and .ci/run with the user's own Python, so it needs nothing but the standard library
and runs under Python 3.6 or later. Prints what to install and exits with 1; is silent when all is there.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

PROGRAM = """#include <Python.h>
#include <pthread.h>
int main(void) { return PY_VERSION_HEX == 0; }
"""


def compiler() -> list:
    """The command that setuptools compiles with: $CC, else the one that Python itself was built with."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def headers() -> str:
    """The folder where Python.h should be."""
    return sysconfig.get_paths()["include"]


def python_problem() -> str:
    if sys.version_info >= (3, 10):  # noqa: UP036
        return ""
    version = sys.version.split()[0]
    return (
        f"Python 3.10 or later is needed; {sys.executable} is {version}. Name another one: make PYTHON=python3.11 ..."
    )


def venv_problem() -> str:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        return (
            "this Python cannot make virtual environments (no venv or ensurepip). On Debian, Ubuntu and "
            f"Raspberry Pi OS: sudo apt-get install python3-venv (or python{version}-venv)"
        )
    return ""


def compiler_problem() -> str:
    command = compiler()
    if not shutil.which(command[0]):
        return (
            f"no C compiler was found ({command[0]}). On Debian, Ubuntu and Raspberry Pi OS: "
            "sudo apt-get install build-essential. Another compiler: make CC=clang ..."
        )
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "check.c")
        with open(source, "w") as file:
            file.write(PROGRAM)
        result = subprocess.run(
            [*command, "-I" + headers(), "-c", source, "-o", source + ".o"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,  # noqa: UP021
        )
    if result.returncode == 0:
        return ""
    if "Python.h" in result.stdout:
        return (
            "the C headers of this Python are missing (Python.h). "
            "On Debian, Ubuntu and Raspberry Pi OS: sudo apt-get install python3-dev"
        )
    return f"the C compiler ({' '.join(command)}) cannot compile a small program:\n{result.stdout.rstrip()}"


def main() -> int:
    problems = [problem for problem in (python_problem(), venv_problem(), compiler_problem()) if problem]
    for problem in problems:
        print("error: " + problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
