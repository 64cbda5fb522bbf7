"""Files that appear whole or not at all: the one way in which the package writes what it cannot afford to lose.

Used by pack, convert, saved sessions and profiles of hot experts. It knows nothing of what is written.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PartialFile:
    """A file in the making: its descriptor, open for reading and writing, and the name that it has meanwhile."""

    descriptor: int
    path: str

    def write(self, offset: int, data: bytes | memoryview | npt.NDArray[Any]) -> None:
        """Writes all of the bytes at an offset; several threads may."""
        view = np.ascontiguousarray(data).data.cast("B") if isinstance(data, np.ndarray) else memoryview(data)
        while view:
            done = os.pwrite(self.descriptor, view, offset)
            view, offset = view[done:], offset + done

    def reserve(self, size: int) -> None:
        """Claims the space of the whole file at once, so that a full disk shows before minutes of work."""
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self.descriptor, 0, size)
        except OSError as problem:  # file systems that cannot reserve refuse in other ways
            if problem.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[PartialFile]:
    """A file beside `target` that takes its name when the block ends well and is on disk, and goes when it fails.

    Each writer has a file of its own (`.NAME.RANDOM.part`), so that two writers of one target never mix: the last one
    wins, whole. It is locked while it is written; what a killed writer left is not, and the next one removes it. A
    symbolic link is written through, and the mode of an older file is kept.

    Raises OSError, such as a full disk or a folder that cannot be written; an older file then stays as it was.
    """
    target = os.path.realpath(target)
    folder, name = os.path.split(target)
    _remove_leftovers(folder, name)
    try:
        descriptor, path = _create(folder, name)
    except OSError as problem:
        problem.filename = target  # the name that the caller knows
        raise
    try:
        with suppress(FileNotFoundError):
            os.fchmod(descriptor, os.stat(target).st_mode & 0o777)
        yield PartialFile(descriptor, path)
        os.fsync(descriptor)
        os.replace(path, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    _sync_folder(folder)


def _create(folder: str, name: str) -> tuple[int, str]:
    """A new locked file and its path."""
    while True:
        path = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.part")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(BlockingIOError, FileNotFoundError):  # another writer has taken it for a leftover
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(path)
            return descriptor, path
        os.close(descriptor)


def _remove_leftovers(folder: str, name: str) -> None:
    """Removes the parts of writers that are gone."""
    for path in glob.glob(f".{glob.escape(name)}.*.part", root_dir=folder):
        with suppress(OSError):
            descriptor = os.open(os.path.join(folder, path), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(os.path.join(folder, path))
            finally:
                os.close(descriptor)


def _sync_folder(folder: str) -> None:
    """Makes the new name last through a power cut, where the file system can sync a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
