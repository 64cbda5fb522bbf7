"""Files that appear whole or not at all: the one way in which the package writes what it cannot afford to lose.

Used by pack, convert, saved sessions and profiles of hot experts. It knows nothing of what is written.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RANDOM = 4  # bytes of a part's own name
LONGEST = 255 - len("...part") - 2 * RANDOM  # bytes of the target's name in it


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

    def settle(self) -> None:
        """Puts on disk what was written, and takes it out of the system's cache, which a memory limit counts."""
        _sync(self.descriptor)
        forget(self.descriptor)

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
    wins, whole. A lock of the target would make the second one wait, or fail. The file itself is locked while it is
    written; what a killed writer left is not, and the next one removes it. Where a file system has no locks, leftovers
    stay: nobody could tell them from the file of a living writer. A symbolic link is written through, and the mode of
    an older file is kept.

    Raises OSError, such as a full disk, a folder that cannot be written or a target that is no file; an older file then
    stays as it was.
    """
    target = os.path.realpath(target)
    folder, name = os.path.split(target)
    mode = _mode(target)
    _remove_leftovers(folder, name)
    try:
        descriptor, path = _create(folder, name)
    except OSError as problem:
        problem.filename = target  # the name that the caller knows
        raise
    try:
        if mode is not None:
            with suppress(PermissionError):  # FAT keeps none
                os.fchmod(descriptor, mode)
        yield PartialFile(descriptor, path)
        _sync(descriptor)
        os.replace(path, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    _sync_folder(folder)


def forget(descriptor: int, offset: int = 0, size: int = 0) -> None:
    """Takes pages that are on disk out of the system's cache: `size` bytes of a file, 0 for all that follow; a hint."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def _mode(target: str) -> int | None:
    """The permissions of the file there, None where there is none. OSError for what a file must not replace."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a device or pipe, no file", target)
    return mode & 0o777


def _prefix(name: str) -> str:
    """How the parts of a target are called, short enough for every file system that takes the target's own name."""
    return f".{os.fsencode(name)[:LONGEST].decode(errors='ignore')}."


def _create(folder: str, name: str) -> tuple[int, str]:
    """A new file, locked where that is possible, and its path."""
    while True:
        path = os.path.join(folder, f"{_prefix(name)}{secrets.token_hex(RANDOM)}.part")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(path)
        except (BlockingIOError, FileNotFoundError):  # another writer has taken it for a leftover
            os.close(descriptor)
        except OSError:  # no locks here
            return descriptor, path
        else:
            return descriptor, path


def _remove_leftovers(folder: str, name: str) -> None:
    """Removes the parts of writers that are gone, and no file that only looks like one."""
    random = re.compile(rf"{re.escape(_prefix(name))}[0-9a-f]{{{2 * RANDOM}}}\.part")
    for path in glob.glob(f"{glob.escape(_prefix(name))}*.part", root_dir=folder):
        if not random.fullmatch(path):
            continue
        with suppress(OSError):
            descriptor = os.open(os.path.join(folder, path), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(os.path.join(folder, path))
            finally:
                os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Waits until a file or folder is on disk, where the file system can tell."""
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _sync_folder(folder: str) -> None:
    """Makes the new name last through a power cut. A folder that cannot be read cannot be opened for it."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)
