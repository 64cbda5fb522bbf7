"""Files that appear whole or not at all: two writers, killed ones, full disks, renames that fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

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
