"""Tests the ARM wheels without a board: in a real arm64 (and armhf) Debian userland under qemu's user emulation.

Run by `make test-arm` and .ci/run. It cross-compiles the wheel (tools/build/build_wheels.py), unpacks Debian's packages
of the other architecture into a cache folder, installs the wheel with what it depends on beside it, and runs
tests/engine/test_kernels.py and tests/support/arm_check.py on several CPU models. Nothing is installed on this machine
and no setting of its package manager is changed. Where qemu or the network is missing it says so and exits with 0: a
skip.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smallthinker_edge_arm"
# The kernel table that each CPU model must choose: the Raspberry Pi 4's, the Pi 5's, and all that qemu has.
MODELS = {"cortex-a72": "neon", "cortex-a76": "dotprod", "max": "i8mm"}


class Skip(Exception):
    """Something that this machine lacks."""


@dataclass(frozen=True)
class Machine:
    """An architecture: Debian's name, qemu's, the wheel's platform, and what comes from where."""

    debian: str
    qemu: str
    platform: str
    triplet: str
    packages: tuple[str, ...]  # Debian's
    wheels: tuple[str, ...]  # PyPI's
    cpus: dict[str, str] = field(default_factory=dict)


ARM64 = Machine(
    "arm64", "aarch64", "manylinux_2_28_aarch64", "aarch64-linux-gnu", ("python3", "libstdc++6"),
    ("numpy", "tokenizers", "psutil", "jinja2", "gguf", "pytest"), MODELS,
)  # fmt: skip
# PyPI has no NumPy and psutil for armv7l: Debian's.
ARMHF = Machine(
    "armhf", "arm", "manylinux_2_31_armv7l", "arm-linux-gnueabihf",
    ("python3", "python3-numpy", "python3-psutil", "python3-jinja2", "python3-yaml", "python3-requests", "libstdc++6"),
    ("tokenizers", "gguf", "pytest"), {"cortex-a7": "ref"},
)  # fmt: skip


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, **options)  # type: ignore[call-overload, no-any-return]


def find_qemu(machine: Machine) -> str:
    for name in (f"qemu-{machine.qemu}-static", f"qemu-{machine.qemu}"):
        if path := shutil.which(name):
            return path
    raise Skip(f"qemu-{machine.qemu} is not installed (Debian: apt-get install qemu-user-static)")


def userland(machine: Machine) -> Path:
    """A folder with the unpacked Debian packages; downloaded once."""
    folder = CACHE / machine.debian
    done = folder / f"unpacked-{'-'.join(machine.packages)}"
    if done.exists():
        return folder / "root"
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Skip("no apt-get here: the ARM userland is made of Debian's packages")
    state = folder / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").write_text("")  # nothing is installed: everything needed is downloaded
    options = {
        "APT::Architecture": machine.debian, "APT::Architectures::": machine.debian, "APT::Sandbox::User": "root",
        "Dir::State": state / "state", "Dir::Cache": state / "cache", "Dir::State::status": state / "status",
        "Acquire::Languages": "none",
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(part for item in options.items() for part in ("-o", f"{item[0]}={item[1]}"))]
    run([*apt, "update"], capture_output=True, check=False)  # one index may fail and the packages still be there
    result = run(
        [*apt, "-y", "--no-install-recommends", "--download-only", "install", *machine.packages], capture_output=True,
        check=False,
    )  # fmt: skip
    if result.returncode != 0:
        raise Skip(f"Debian's {machine.debian} packages cannot be downloaded: {result.stderr.strip()[-300:]}")
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
        package.unlink()
    done.touch()
    return folder / "root"


def python_of(root: Path) -> Path:
    return next(path for path in sorted((root / "usr/bin").glob("python3.*")) if path.name[8:].isdigit())


def install(machine: Machine, root: Path, wheel: Path) -> Path:
    """The wheel and what it needs in one folder; PyPI's part is downloaded once."""
    version = python_of(root).name.removeprefix("python")
    site = CACHE / machine.debian / f"site-{version}"
    platforms = [f"manylinux_2_{glibc}_{machine.platform.split('_', 3)[3]}" for glibc in (17, 27, 28)]
    pip = [
        *(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--upgrade"),
        *("--python-version", version, "--implementation", "cp", "--only-binary=:all:"),
    ]
    complete = site / f"complete-{'-'.join(machine.wheels)}"
    if not complete.exists():
        shutil.rmtree(site, ignore_errors=True)
        tags = [part for tag in (*platforms, "manylinux2014_" + platforms[0][17:]) for part in ("--platform", tag)]
        options = ["--no-deps"] if machine is ARMHF else []
        names = [*machine.wheels, *(("iniconfig", "packaging", "pluggy", "pygments", "tqdm") if options else ())]
        result = run([*pip, *options, *tags, "--target", str(site), *names], capture_output=True, check=False)
        if result.returncode != 0:
            raise Skip(f"wheels for {machine.platform} cannot be downloaded: {result.stderr.strip()[-300:]}")
        complete.touch()
    own = CACHE / machine.debian / "own"
    shutil.rmtree(own, ignore_errors=True)
    run([*pip, "--no-deps", "--platform", machine.platform, "--target", str(own), str(wheel)], check=True)
    return own


def python_command(
    machine: Machine, qemu: str, cpu: str, arguments: list[str], options: list[str]
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that runs the emulated Python with the installed wheel."""
    root = CACHE / machine.debian / "root"
    python = python_of(root)
    libraries = root / "usr/lib" / machine.triplet
    variables = {
        "PYTHONHOME": root / "usr",
        "PYTHONPATH": f"{CACHE / machine.debian / 'own'}:{CACHE / machine.debian / f'site-{python.name[6:]}'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Debian chooses a BLAS when packages are configured, which unpacking does not do.
        "LD_LIBRARY_PATH": f"{libraries}/blas:{libraries}/lapack",
    }
    settings = [part for item in variables.items() for part in ("-E", f"{item[0]}={item[1]}")]
    command = [qemu, *options, "-cpu", cpu, "-L", str(root), *settings, str(python), *arguments]
    return command, {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def emulate(machine: Machine, cpu: str, arguments: list[str]) -> None:
    """Runs the emulated Python in tests/. Raises CalledProcessError where it fails."""
    command, environment = python_command(machine, find_qemu(machine), cpu, arguments, [])
    run(command, cwd=ROOT / "tests", check=True, env=environment)


def check_machine(machine: Machine, expected: Path, wheel: Path | None, build: Path) -> None:
    find_qemu(machine)
    root = userland(machine)
    if wheel is None:
        if importlib.util.find_spec("ziglang") is None:
            raise Skip("the cross compiler is not installed: pip install ziglang")
        build_wheels = [sys.executable, str(ROOT / "tools/build/build_wheels.py"), "--no-audit", "--build", str(build)]
        run([*build_wheels, "--platform", machine.platform, "--out", str(build / "out")], check=True)
        (wheel,) = (build / "out").glob(f"*{machine.platform}.whl")
    install(machine, root, wheel)
    settings = build / "pytest.ini"  # instead of the project's, which is for this machine's set-up
    settings.write_text(f"[pytest]\npythonpath = {ROOT / 'tests/support'}\n")
    for cpu, table in machine.cpus.items():
        start = time.monotonic()
        # Only the model's own table: the others have had their turn on the model that chooses them.
        options = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest", "-c", str(settings), "--rootdir=."]
        kernels = ["-m", "pytest", *options]
        emulate(machine, cpu, [*kernels, "-k", table, "engine/test_kernels.py"])
        emulate(machine, cpu, ["support/arm_check.py", "compare", str(expected), table])
        print(f"{machine.debian} on {cpu}: passed in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", choices=("arm64", "armhf", "all"), default="all")
    parser.add_argument("--wheel", type=Path, help="test this wheel instead of building one (one machine only)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "wheels", help="folder for what is in between")
    arguments = parser.parse_args()
    expected = arguments.build / "expected"
    expected.mkdir(parents=True, exist_ok=True)
    run([sys.executable, str(ROOT / "tests/support/arm_check.py"), "record", str(expected)], check=True)
    try:
        for machine in (ARM64, ARMHF):
            if arguments.machine in (machine.debian, "all"):
                check_machine(machine, expected, arguments.wheel, arguments.build)
    except Skip as reason:
        print(f"ARM tests skipped: {reason}", flush=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"ARM tests failed: {' '.join(map(str, error.cmd[-6:]))}") from None


if __name__ == "__main__":
    main()
