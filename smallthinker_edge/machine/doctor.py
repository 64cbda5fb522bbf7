"""What this machine offers the library: processor and kernel tables, memory and storage, their limits and speeds.

Run by `smallthinker-edge doctor`. It measures memory and storage by reading; in a folder it first writes a temporary
file, which it removes. It changes no setting.
"""

from __future__ import annotations

import mmap
import os
import platform
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from smallthinker_edge._native import kernels
from smallthinker_edge.machine import cgroup, cpus, thermal
from smallthinker_edge.measure import limits as read_limits
from smallthinker_edge.printable import printable

Rows = list[tuple[str, str]]

FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "asimd", "asimdhp", "asimddp", "i8mm", "sve")
BLOCK = 1 << 20  # of one read; an expert of the 4B takes 1.9 MiB, of the 21B 3.2 MiB, and larger gains nothing
FILE = 256 << 20  # of the temporary file
SECONDS = 1.5  # of one measurement
SPARE = 256 << 20  # left to the rest of the system where no cgroup limits the process


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second of reads of BLOCK bytes at random places; direct: past the page cache (O_DIRECT)."""

    direct: bool
    one_reader: float
    four_readers: float


def report(path: str | os.PathLike[str] = ".", root: Path = Path("/")) -> str:
    """The whole report as lines of text.

    Args:
        path: a file (a model, say) to read, or a folder to write a temporary file of 256 MiB to.

    Raises OSError where `path` cannot be read or written.
    """
    rows = [*processor(root), *memory(root), *memory_reads(cpus.auto_threads(root)), *disk(path)]
    rows.append(("recommended budget", f"memory={recommended_budget(root) >> 20}MiB"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def processor(root: Path = Path("/")) -> Rows:
    """CPU model and features, cores, threads and kernel tables."""
    info = _cpu_info(root)
    words = set(info.get("flags", info.get("features", "")).split())
    allowed, big = cpus.allowed_cpus(), cpus.big_cpus(root)
    forced = os.environ.get("SMALLTHINKER_CPU")
    tables = kernels.tables()
    chosen = forced or tables[0]
    quota = cpus.cpu_quota(root)
    rows = [
        ("processor", f"{info.get('model name') or platform.processor() or 'unknown'} ({platform.machine()})"),
        ("features", " ".join(name for name in FEATURES if name in words) or "none that the kernels use"),
        ("kernel table", f"{chosen} (SMALLTHINKER_CPU)" if forced else f"{chosen} (of {', '.join(tables)})"),
        ("cores", f"{len(allowed)} allowed" + (f", {len(big)} of them fast" if big != allowed else "")),
        ("CPU quota", f"{quota} cores (cgroup)" if quota else "none"),
        ("threads", str(cpus.auto_threads(root))),
    ]
    if forced and forced not in tables:
        rows.append(("warning", f"this CPU cannot run the kernel table {forced!r}"))
    for name, value in thermal.readings(root).items():
        rows.append((name.replace("_", " "), str(value) or "no"))
    return rows


def memory(root: Path = Path("/")) -> Rows:
    """Memory, page size, huge pages and the cgroup's limit."""
    system = psutil.virtual_memory()
    limit, version = cgroup.memory_limit(root), cgroup.version(root)
    huge = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = huge[huge.find("[") + 1 : huge.find("]")] if "[" in huge else "not offered"
    return [
        ("memory", f"{_gib(system.total)}, {_gib(system.available)} available"),
        ("page size", f"{os.sysconf('SC_PAGE_SIZE')} bytes"),
        ("huge pages", chosen),
        (
            "cgroup",
            f"version {version}, " + (f"limit {_gib(limit)}" if limit else "no memory limit") if version else "none",
        ),
    ]


def memory_reads(threads: int) -> Rows:
    """Speed of reading memory that no cache holds, with one thread and with all: what decode is bound by."""
    space = read_limits.arbitrary_weights(read_limits.streaming_bytes())
    limits = [read_limits.read_limit(count, space, patterns=[(4, 0), (4, 4096)]) for count in sorted({1, threads})]
    speeds = [f"{limit} with {limit.threads}" for limit in limits]
    return [("memory reads", ", ".join(speeds) + (" threads" if threads > 1 else " thread"))]


def recommended_budget(root: Path = Path("/")) -> int:
    """Bytes to give to `memory=`: the cgroup's limit, or what is available less a share for the rest of the system."""
    available = int(psutil.virtual_memory().available)
    limit = cgroup.memory_limit(root)
    free = max(available - max(SPARE, available // 10), available // 2)
    return min(limit, free) if limit else free


def disk(path: str | os.PathLike[str]) -> Rows:
    """Speed of random reads at a path, with one and with four reads at once."""
    speed = measure_disk(path)
    how = "O_DIRECT" if speed.direct else "page cache (no O_DIRECT here: this overstates the storage)"
    return [
        (
            f"reads at {printable(os.fspath(path))}",
            f"{_mb(speed.one_reader)}, {_mb(speed.four_readers)} with four at once; {BLOCK >> 20} MiB each, {how}",
        ),
    ]


def measure_disk(path: str | os.PathLike[str]) -> DiskSpeed:
    """Reads blocks at random places of a file, or of a temporary file in a folder."""
    with _file_to_read(Path(path)) as file:
        fd, direct = _open(file)
        try:
            blocks = os.fstat(fd).st_size // BLOCK
            if blocks == 0:
                raise OSError(f"{file} is shorter than {BLOCK} bytes: nothing to measure")
            return DiskSpeed(direct, _read_speed(fd, blocks, 1), _read_speed(fd, blocks, 4))
        finally:
            os.close(fd)


def _open(file: Path) -> tuple[int, bool]:
    """(descriptor, whether it reads directly). Some file systems take the flag and refuse the first read."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(fd, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
                return fd, True
            except OSError:
                os.close(fd)
    return os.open(file, os.O_RDONLY), False


@contextmanager
def _file_to_read(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=path, prefix=".smallthinker-doctor-") as file:
        data = random.Random(0).randbytes(BLOCK)  # not zeros: some storage compresses
        for _ in range(FILE // BLOCK):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def _read_speed(fd: int, blocks: int, readers: int) -> float:
    """Bytes per second that so many threads read together."""
    done, failed = [0] * readers, []
    end = time.monotonic() + SECONDS

    def read(reader: int) -> None:
        places = random.Random(reader)
        buffer = mmap.mmap(-1, BLOCK)  # page aligned, whatever the page size is
        try:
            while time.monotonic() < end:
                done[reader] += os.preadv(fd, [buffer], places.randrange(blocks) * BLOCK)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(reader,)) for reader in range(readers)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return sum(done) / (time.monotonic() - start)


def _cpu_info(root: Path) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo, names in lower case."""
    info: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        info.setdefault(name.strip().lower(), value.strip())
    board = _text(root / "proc/device-tree/model").strip("\0")
    if board and "model name" not in info:
        info["model name"] = board
    return info


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _mb(speed: float) -> str:
    return f"{speed / 1e6:.0f} MB/s"
