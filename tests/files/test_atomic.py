"""Files that appear whole or not at all: two writers, killed ones, full disks, renames that fail."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from smallthinker_edge.files.atomic import atomic_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    target.chmod(0o640)
    with atomic_file(target) as file:
        file.write(3, b"new")
        file.write(0, b"the")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"thenew"
    assert target.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["a"]


def fail_after(target: Path) -> None:
    with atomic_file(target) as file:
        file.write(0, b"half")
        raise KeyboardInterrupt


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        fail_after(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with atomic_file(target) as first, atomic_file(target) as second:
        first.write(0, b"1" * 100)
        second.write(0, b"22")
    assert target.read_bytes() in (b"1" * 100, b"22")
    assert names(tmp_path) == ["a"]


def test_a_rename_that_fails(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    with pytest.raises(OSError, match="irectory"), atomic_file(tmp_path / "folder") as file:
        file.write(0, b"x")
    assert names(tmp_path) == ["folder"]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link") as file:
        file.write(0, b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError), atomic_file(tmp_path / "a"):
        pass


def write_too_much(target: Path) -> None:
    with atomic_file(target) as file:
        file.write(0, b"x" * 100_000)


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_too_much(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_killed_writer_leaves_the_old_file_and_its_part_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "a[1].bin"
    target.write_bytes(b"old")
    code = (
        "import os, sys; from smallthinker_edge.files.atomic import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(0, b'half')\n    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, target], check=False).returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    with atomic_file(target) as first:
        first.write(0, b"first")
        with atomic_file(target) as other:  # leaves the part of a living writer alone
            other.write(0, b"other")
        assert target.read_bytes() == b"other"
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == [target.name]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def refuse(number: int) -> Callable[..., NoReturn]:
    def call(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("module", "call", "number"),
    [(fcntl, "flock", errno.ENOLCK), (os, "fsync", errno.EINVAL), (os, "fchmod", errno.EPERM)],
)
def test_file_systems_without_locks_syncs_or_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, call: str, number: int
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(module, call, refuse(number))
    before = open_descriptors()
    with atomic_file(tmp_path / "a") as file:
        file.write(0, b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("call", "number"), [("fsync", errno.EIO), ("fsync", errno.ENOSPC), ("replace", errno.EROFS), ("open", errno.EROFS)]
)
def test_what_the_system_refuses_is_raised_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(number))
        with pytest.raises(OSError) as raised, atomic_file(tmp_path / "a") as file:
            file.write(0, b"new")
    assert raised.value.errno == number
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]
    assert open_descriptors() == before


def test_files_that_look_like_parts_are_left_alone(tmp_path: Path) -> None:
    others = [".a.notes.part", ".a.0123456.part", ".a.b.01234567.part", ".b.01234567.part"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".a.01234567.part").touch()
    with atomic_file(tmp_path / "a"):
        pass
    assert names(tmp_path) == sorted([*others, "a"])


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    target = tmp_path / ("\u00e9" * 127)
    with atomic_file(target) as file:
        file.write(0, b"new")
    assert names(tmp_path) == [target.name]


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(OSError, match="pipe"), atomic_file(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_fifo()
    assert names(tmp_path) == ["a"]
