"""A bounded folder of sessions saved at the end of a long prefix, such as a system prompt with its tools.

Used by reuse.py, so that such a prefix is computed once, also over restarts. What is in the folder is not trusted: a
file that is damaged or of another model is passed over. Several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from smallthinker_edge.errors import SessionFormatError
from smallthinker_edge.files.session_file import saved_tokens
from smallthinker_edge.session import Session

logger = logging.getLogger(__name__)
SHORTEST = 256  # tokens that are worth a file, and worth reading one
SUFFIX = ".stsession"


class SavedPrefixes:
    """The files of one folder; the one used longest ago goes first. Safe for several threads, which take turns.

    Args:
        folder: made with the first file, for this user only.
        most_bytes: of all its files together; a session that is larger alone is not saved.
        new: makes an empty session. kv: the kind of its KV cache. model_hash: see session_file.model_hash().

    Errors of the disk are logged; otherwise it is then as if nothing were saved.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        most_bytes: int,
        new: Callable[[], Session],
        kv: str,
        model_hash: Callable[[], bytes],
    ) -> None:
        self._folder, self._most, self._new = Path(folder), most_bytes, new
        self._kv, self._model_hash = kv, model_hash
        self._lock = threading.Lock()
        # Name -> tokens, None where a file is of no use. A name stands for its contents, so files never change.
        self._known: dict[str, npt.NDArray[np.int32] | None] = {}

    def take(self, tokens: Sequence[int], more_than: int) -> Session | None:
        """A new session that has decoded the longest saved beginning of the tokens, but not all of them.

        None where none is at least SHORTEST tokens longer than `more_than`.
        """
        with self._lock:
            return self._take(np.asarray(tokens, np.int32), more_than)

    def _take(self, ids: npt.NDArray[np.int32], more_than: int) -> Session | None:
        while (name := self._longest(ids, more_than + SHORTEST)) is not None:
            session = self._new()
            try:
                session.load(self._folder / name)
                os.utime(self._folder / name)
                return session
            except (SessionFormatError, OSError) as error:
                session.close()
                logger.warning("a saved prefix is passed over: %s", error)
                self._known[name] = None
        return None

    def _longest(self, ids: npt.NDArray[np.int32], least: int) -> str | None:
        best, length = None, least - 1
        if ids.size > least:
            self._look()
            for name, prefix in self._known.items():
                longer = prefix is not None and length < prefix.size < ids.size
                if prefix is not None and longer and np.array_equal(prefix, ids[: prefix.size]):
                    best, length = name, prefix.size
        return best

    def _look(self) -> None:
        """Takes up what is new in the folder, and forgets what is gone."""
        names = [path.name for path, _ in self._files()]
        found = {name: self._known[name] for name in names if name in self._known}
        for name in names:
            if name not in found:
                found[name] = None
                with suppress(OSError):
                    found[name] = saved_tokens(self._folder / name, self._kv, self._model_hash())
        self._known = found

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """The folder's saved sessions, the one used longest ago first."""
        files = []
        for path in self._folder.glob("*" + SUFFIX):  # none where there is no folder
            with suppress(OSError):  # another process has removed it
                files.append((path, path.stat()))
        return sorted(files, key=lambda file: file[1].st_mtime_ns)

    def save(self, session: Session) -> None:
        """Saves a session as it is, unless it is short or there already; the oldest files make room for it."""
        tokens = np.asarray(session.tokens, "<i4")
        if tokens.size < SHORTEST or session.kv_bytes > self._most:
            return
        digest = hashlib.sha256(self._model_hash() + self._kv.encode() + tokens.tobytes())
        path = self._folder / (digest.hexdigest()[:40] + SUFFIX)
        try:
            with self._lock:
                if path.exists():
                    os.utime(path)
                    return
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._make_room(session.kv_bytes)
                session.save(path)
                self._make_room(0)
        except OSError as error:
            logger.warning("a prefix of %d tokens cannot be saved: %s", tokens.size, error)
            return
        logger.info("saved a prefix of %d tokens in %s", tokens.size, path)

    def _make_room(self, size: int) -> None:
        """Removes the files used longest ago until so many bytes more are within the bound."""
        files = self._files()
        total = sum(stat.st_size for _, stat in files)
        for path, stat in files:
            if total + size <= self._most:
                break
            path.unlink(missing_ok=True)
            total -= stat.st_size
