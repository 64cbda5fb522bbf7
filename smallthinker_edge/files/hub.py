"""Files of model repositories on the Hugging Face Hub: what there is, a file's first bytes, downloads into the cache.

Called by pull.py and `smallthinker-edge plan hf:...`. It speaks through `huggingface_hub` (the [hub] extra), in its
cache, with its variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE), and knows nothing of models. Of that package
only the writing of blobs is done here, by HTTP and never by XET: a killed download goes on where it stopped, which
recent versions of it cannot, and a file gets its name in the cache when its checksum is right.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from smallthinker_edge._native.gguf_reader import Part
from smallthinker_edge.errors import HubError, ModelFormatError
from smallthinker_edge.files.atomic import atomic_file

logger = logging.getLogger(__name__)

ADDRESS = re.compile(r"(?:hf:(?://)?)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")
SAFE_NAME = r"\w[^/\\\0]*"  # of what a server names and a path is made of
FIRST_BYTES = 8 << 20  # most headers with a vocabulary of 152k tokens fit
MOST_BYTES = 256 << 20  # of a header
SLICE = 1 << 20
TIMEOUT = 10.0
PART = ".smallthinker.part"


@dataclass(frozen=True)
class Address:
    """A repository, and what of it: "ORG/NAME", "hf:ORG/NAME@REVISION/FILE"."""

    repo: str
    revision: str
    file: str | None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ValueError for what is no address."""
        match = ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(f"write ORG/NAME, ORG/NAME@REVISION or hf:ORG/NAME/FILE, not {text!r}")
        return cls(match["repo"], match["revision"] or "main", match["file"])


@dataclass(frozen=True)
class Listing:
    """The files of one commit of a repository.

    Attributes:
        files: name -> size in bytes. local: they are those in the cache, because the Hub could not be asked.
    """

    repo: str
    revision: str
    commit: str
    files: dict[str, int]
    local: bool = False
    folder: str = field(default="", compare=False)  # of the snapshot, where local


def client() -> Any:
    """The huggingface_hub module. Raises HubError where it is not installed."""
    try:
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError:
        raise HubError("the Hugging Face Hub needs: pip install 'smallthinker_edge[hub]'") from None
    return huggingface_hub


def network_errors() -> tuple[type[Exception], ...]:
    """What the client's HTTP library raises, which differs between its versions; OSError among them."""
    bases: tuple[type[Exception], ...] = client().errors.HfHubHTTPError.__bases__
    return (*bases, OSError)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Errors of the client and the network become a HubError that says what could not be had and what helps."""
    errors = client().errors
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as problem:
        message = "is gated: accept its conditions on its page, and set HF_TOKEN to a token of that account"
        raise HubError(f"{what} {message}") from problem
    except errors.RepositoryNotFoundError as problem:
        message = "does not exist, or is private: look at its name, and at HF_TOKEN"
        raise HubError(f"{what} {message}") from problem
    except errors.RevisionNotFoundError as problem:
        raise HubError(f"{what} has no such branch, tag or commit") from problem
    except errors.EntryNotFoundError as problem:
        raise HubError(f"{what} does not exist") from problem
    except errors.OfflineModeIsEnabled as problem:
        raise HubError(f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it") from problem
    except errors.HfHubHTTPError as problem:
        status = problem.response.status_code
        help_ = "look at HF_TOKEN" if status in (401, 403) else "try again later"
        raise HubError(f"{what} cannot be had: the server answers {status}; {help_}") from problem
    except errors.HFValidationError as problem:
        raise HubError(f"{what} is no name that the Hub knows: {problem}") from problem
    except network_errors() as problem:
        if isinstance(problem, OSError) and problem.errno is not None and not isinstance(problem, ConnectionError):
            raise  # of this machine, such as a full disk
        raise HubError(f"{what} cannot be had from {client().constants.ENDPOINT}: {problem}; try again") from problem


def listing(repo: str, revision: str = "main") -> Listing:
    """The files of a repository; those that the cache has of it where the Hub cannot be reached.

    Raises HubError.
    """
    hub = client()
    with telling(f"the repository {repo}"):
        try:
            info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        except hub.errors.HfHubHTTPError:
            raise
        except network_errors() as problem:
            found = cached(repo, revision)
            if found is None:
                raise
            logger.warning("the Hub cannot be reached, and the cache is used: %s", problem)
            return found
    if not re.fullmatch(SAFE_NAME, str(info.sha)):
        raise HubError(f"the repository {repo} has no commit")
    files = {
        sibling.rfilename: int(sibling.size or 0)
        for sibling in info.siblings or ()
        if all(re.fullmatch(SAFE_NAME, step) for step in sibling.rfilename.split("/"))
    }
    return Listing(repo, revision, str(info.sha), files)


def repo_folder(repo: str) -> Path:
    """Where the cache has a repository."""
    return Path(client().constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def cached(repo: str, revision: str) -> Listing | None:
    """What the cache has of a revision, None where that is nothing."""
    folder = repo_folder(repo)
    with suppress(OSError):
        reference = folder / "refs" / revision
        commit = reference.read_text(encoding="ascii").strip() if reference.is_file() else revision
        snapshot = folder / "snapshots" / commit
        names = [path for path in snapshot.rglob("*") if path.is_file()]
        files = {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in names}
        return Listing(repo, revision, commit, files, True, str(snapshot)) if files else None
    return None


def missing_bytes(found: Listing, names: Sequence[str]) -> int:
    """How much of the files there is to fetch, less what a download that was cut short has left."""
    if found.local:
        return 0
    folder = repo_folder(found.repo)
    snapshot = folder / "snapshots" / found.commit
    missing = sum(found.files[name] for name in names if not (snapshot / name).is_file())
    return max(0, missing - sum(part.stat().st_size for part in folder.glob(f"blobs/*{PART}")))


def download(found: Listing, name: str) -> str:
    """A file of a listing in the cache, fetched where it is not there; returns its path.

    A download that was cut short goes on where it stopped. Raises HubError, among others where what came is not what
    the Hub had announced; OSError such as a full disk.
    """
    if found.local:
        return os.path.join(found.folder, name)
    hub = client()
    snapshot = repo_folder(found.repo) / "snapshots" / found.commit / name
    if not snapshot.is_file():
        what = f"{found.repo}/{name}"
        with telling(what):
            url = hub.hf_hub_url(found.repo, name, revision=found.commit)
            metadata = hub.get_hf_file_metadata(url)
            if metadata.etag is None or metadata.size is None or not re.fullmatch(SAFE_NAME, metadata.etag):
                raise HubError(f"{what} has no size or checksum: HF_ENDPOINT is no server of the Hub's kind")
            blob = repo_folder(found.repo) / "blobs" / metadata.etag
            blob.parent.mkdir(parents=True, exist_ok=True)
            _fetch_blob(url, blob, metadata.size, what)
            # The blob is there, so this only gives it its name in the snapshot.
            hub.hf_hub_download(found.repo, name, revision=found.commit)
    _remember(found)
    return str(snapshot)


def _remember(found: Listing) -> None:
    """Writes which commit the revision was, for those who look offline."""
    reference = repo_folder(found.repo) / "refs" / found.revision
    if found.revision != found.commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(reference) as file:
            file.write(0, found.commit.encode("ascii"))


def _fetch_blob(url: str, blob: Path, size: int, what: str) -> None:
    """Fetches a file of the cache under a name of its own, which it loses when it is whole and right."""
    part = blob.with_name(blob.name + PART)
    while not blob.exists():
        with open(part, "ab") as file:
            with suppress(OSError):  # no locks here
                fcntl.flock(file, fcntl.LOCK_EX)
            if not part.exists() or not os.path.samestat(os.fstat(file.fileno()), part.stat()):
                continue  # another process has finished or given it up meanwhile
            while (done := file.tell()) < size:
                try:
                    _get(url, file, done, size)
                except network_errors() as problem:  # some versions of the client do not go on by themselves
                    if file.tell() <= done:
                        raise
                    logger.warning("%s: the connection dropped, and the download goes on: %s", what, problem)
            file.flush()
            os.fsync(file.fileno())
            if not _is_right(part, blob.name, size):
                part.unlink()
                raise HubError(f"{what} came damaged: its size or checksum is not the announced one; fetch it again")
            os.replace(part, blob)


def _get(url: str, file: BinaryIO, start: int = 0, size: int | None = None, span: str = "") -> None:
    """Appends what a URL has, from byte `start` on; goes on by itself where the connection drops.

    size: of the whole, if it must be that. span: of an HTTP range, instead of a start.
    """
    headers = client().utils.build_hf_headers(library_name="smallthinker_edge") | {"Accept-Encoding": "identity"}
    if span:
        headers["Range"] = f"bytes={span}"
    client().file_download.http_get(url, file, resume_size=start, headers=headers, expected_size=size)


def _is_right(path: Path, etag: str, size: int) -> bool:
    """Whether a file has the size, and the checksum that its ETag is: SHA-256 of large files, git's SHA-1 of others."""
    if path.stat().st_size != size:
        return False
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", etag):
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    else:
        return True  # some mirrors have other ETags
    with open(path, "rb") as file:
        while chunk := file.read(SLICE):
            digest.update(chunk)
    return digest.hexdigest() == etag


class _Enough(Exception):
    """As many bytes came as were wanted."""


class _Limited(io.BytesIO):
    """Takes so many bytes and no more, whatever a server sends."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def write(self, data: Any) -> int:
        super().write(data[: self.most - self.tell()])
        if self.tell() >= self.most:
            raise _Enough
        return len(data)


def some_bytes(found: Listing, name: str, start: int, stop: int) -> bytes:
    """Bytes start..stop-1 of a file in a repository, by an HTTP range."""
    what = f"{found.repo}/{name}"
    taken = _Limited(stop - start)
    with telling(what):
        url = client().hf_hub_url(found.repo, name, revision=found.commit)
        with suppress(_Enough):
            _get(url, taken, span=f"{start}-{stop - 1}")
        if taken.tell() != stop - start:
            raise HubError(f"{what}: the server gave {taken.tell()} bytes for a range of {stop - start}")
    return taken.getvalue()


@contextmanager
def headers_only(found: Listing, names: Sequence[str]) -> Iterator[str]:
    """A model file for looking at, of whose parts only the headers are fetched; yields the path of the first.

    They lie in a temporary folder, as long as the real ones, with holes where tensors are.
    Raises HubError, ModelFormatError where a header is damaged or larger than MOST_BYTES.
    """
    with TemporaryDirectory() as folder:
        paths = [os.path.join(folder, os.path.basename(name)) for name in names]
        for name, path in zip(names, paths, strict=True):
            with open(path, "wb") as file:
                file.truncate(found.files[name])
        for name, path in zip(names, paths, strict=True):
            _fetch_header(found, name, path)
        yield paths[0]


def _fetch_header(found: Listing, name: str, path: str) -> None:
    """Fetches the beginning of a file until its header is whole.

    While it is not, what is missing reads as zeros, and its reader complains: of the same thing twice, with twice as
    much there, if the file itself is to blame.
    """
    size, have, wanted, complaint = found.files[name], 0, FIRST_BYTES, ""
    while True:
        wanted = min(wanted, size)
        with open(path, "r+b") as file:
            file.seek(have)
            file.write(some_bytes(found, name, have, wanted))
        have = wanted
        try:
            if Part(path, 0).header_end <= have:
                return
            problem: ModelFormatError | None = None
        except ModelFormatError as error:
            problem = error
        if problem is not None and (have == size or str(problem) == complaint):
            raise ModelFormatError(str(problem).replace(path, f"hf:{found.repo}/{name}")) from None
        if have >= min(size, MOST_BYTES):
            raise ModelFormatError(f"has no whole header in its first {have} bytes", path=f"hf:{found.repo}/{name}")
        complaint, wanted = str(problem), 2 * have
