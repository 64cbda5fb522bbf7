"""A model of the Hugging Face Hub, made ready to run: which files, how much room, download, convert, pack.

Called by SmallThinker.from_pretrained() and `smallthinker-edge pull`. hub.py fetches; what is made of the files lies in
the cache's folder for such things, and is made once for a commit.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from smallthinker_edge.errors import HubError, ModelFormatError
from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.gguf import SPLIT_NAME, GGUFFile
from smallthinker_edge.files.hub import Address, Listing, client, download, listing, missing_bytes, repo_folder
from smallthinker_edge.files.pack import pack
from smallthinker_edge.files.packed import PackedFile

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
# Types as files are named by them, the first one is taken: small and fast ones, then larger ones.
FAST = ("Q4_0", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0")
TYPE_IN_NAME = re.compile(
    r"(?<![A-Z0-9])(?:IQ\d_[A-Z]+|TQ\d_0|Q\d_K(?:_[SML])?|Q\d_[01]|BF16|F16|F32)(?![A-Z0-9])", re.I
)
OTHER_GGUF = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # which are no models
# What convert() reads of a checkpoint folder.
CHECKPOINT = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*", "model*.safetensors",
    "model.safetensors.index.json", "model_lm_head.pt",
)  # fmt: skip
Q4_SHARE = 4.5 / 16  # of bfloat16
PADDING = 1.01, 16 << 20  # of a packed file, more than measured


@dataclass(frozen=True)
class Choice:
    """The files of a repository that make one model.

    Attributes:
        kind: "packed", "gguf" or "checkpoint". names: of a split file all parts, in order.
    """

    kind: str
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """What a file made of it is called, without a suffix."""
        if self.kind == "checkpoint":
            return "model-q4_0"
        match = SPLIT_NAME.fullmatch(self.names[0])
        stem = match["stem"] if match else self.names[0].removesuffix(".gguf")
        return stem.replace("/", "--")


def choose(files: Mapping[str, int], pattern: str | None = None, repo: str = "the repository") -> Choice:
    """The model to take: a packed file, else a GGUF of a type that runs fast, else a checkpoint, else any GGUF.

    Args:
        files: names and sizes. pattern: a name, or a pattern as of the shell, that leaves fewer to choose from.

    Raises HubError where there is none, or parts are missing.
    """
    names = sorted(name for name in files if pattern is None or name == pattern or fnmatchcase(name, pattern))
    packed = [name for name in names if name.endswith(".stpk")]
    ggufs = [name for name in names if name.endswith(".gguf") and not OTHER_GGUF.search(name)]
    weights = [name for name in names if PurePosixPath(name).match("model*.safetensors") and "/" not in name]
    if packed:
        return Choice("packed", (packed[0],))
    for type_ in FAST:
        for name in ggufs:
            if type_of(name) == type_:
                return Choice("gguf", parts_of(name, files))
    if weights and "config.json" in files:
        wanted = (name for name in sorted(files) if any(fnmatchcase(name, kind) for kind in CHECKPOINT))
        return Choice("checkpoint", tuple(wanted))
    if ggufs:
        return Choice("gguf", parts_of(ggufs[0], files))
    known = ", ".join(sorted(name for name in files if name.endswith((".gguf", ".stpk", ".safetensors")))[:20])
    asked = "" if pattern is None else f" that {pattern!r} matches"
    raise HubError(f"{repo} holds no model{asked}; it has: {known or 'no .gguf, .stpk or .safetensors file'}")


def type_of(name: str) -> str:
    """The tensor type that a file's name tells, "" where it tells none."""
    found = TYPE_IN_NAME.findall(PurePosixPath(name).name)
    return str(found[-1]).upper() if found else ""


def parts_of(name: str, files: Mapping[str, int]) -> tuple[str, ...]:
    """A file, or all parts of the split one that it belongs to. Raises HubError where some are not there."""
    match = SPLIT_NAME.fullmatch(name)
    if match is None:
        return (name,)
    count = int(match["count"])
    names = tuple(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1))
    for part in names:
        if part not in files:
            raise HubError(f"{part} is missing: a split file needs all its {count} parts")
    return names


@dataclass(frozen=True)
class Order:
    """What is to be done, before anything is.

    Attributes:
        files: of the repository. choice: of them. pack: whether a packed file is made.
        target: the file made of the choice, where one is. fetch, make: bytes to fetch, and to write besides, at most.
    """

    files: Listing
    choice: Choice
    pack: bool
    target: str
    fetch: int
    make: int

    def describe(self) -> str:
        """What will be taken and how much room that needs, on one line."""
        names = self.choice.names[0] if self.choice.kind != "checkpoint" else "the checkpoint"
        more = f" (and {len(self.choice.names) - 1} more files)" if len(self.choice.names) > 1 else ""
        return f"{self.files.repo}: {names}{more}, to fetch: {gib(self.fetch)}, to write besides: {gib(self.make)}"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def prepare(repo: str, file: str | None = None, *, pack: bool = True) -> Order:
    """Decides what pull() will do; fetches nothing but the list of files.

    Args:
        repo: "ORG/NAME", "ORG/NAME@REVISION", or an address "hf:ORG/NAME/FILE".
        file: a name or pattern where the repository has several models, see choose().
        pack: make a packed file, whose experts can be paged. A checkpoint is always converted.

    Raises HubError, ValueError for what is no name of a repository.
    """
    address = Address.parse(repo)
    found = listing(address.repo, address.revision)
    choice = choose(found.files, file if file is not None else address.file, address.repo)
    pack = pack and choice.kind != "packed"
    folder = client().cached_assets_path("smallthinker_edge", namespace=address.repo, subfolder=found.commit)
    target = os.path.join(folder, f"{choice.title}.{'stpk' if pack else 'gguf'}")
    if is_ready(target):
        return Order(found, choice, pack, target, 0, 0)
    return Order(found, choice, pack, target, missing_bytes(found, choice.names), _bytes_to_make(choice, found, pack))


def _bytes_to_make(choice: Choice, found: Listing, pack: bool) -> int:
    """Room for what is written besides the download, at its largest."""
    sizes = sum(found.files[name] for name in choice.names)
    converted = 0
    if choice.kind == "checkpoint":
        sizes = converted = int(sizes * Q4_SHARE * PADDING[0]) + PADDING[1]
    elif choice.kind == "gguf" and type_of(choice.names[0]) not in FAST:
        converted = sizes  # where its types do not run
    return converted + (int(sizes * PADDING[0]) + PADDING[1] if pack else 0)


def is_ready(path: str) -> bool:
    """Whether an earlier run has made this file, and this version reads it."""
    try:
        with GGUFFile(path) as gguf:
            if path.endswith(".stpk"):
                packed = PackedFile(gguf)
                packed.experts(ModelConfig.from_gguf(packed))
    except (ModelFormatError, FileNotFoundError):
        return False
    return True


def check_room(order: Order) -> None:
    """Raises HubError where a disk has less left than the order needs."""
    places = {repo_folder(order.files.repo): order.fetch, Path(order.target).parent: order.make}
    needs: dict[int, int] = {}
    for place, size in places.items():
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        device = existing.stat().st_dev
        needs[device] = needs.get(device, 0) + size
        free = shutil.disk_usage(existing).free
        if needs[device] > free:
            raise HubError(
                f"{order.describe()}; but there are {gib(free)} free at {existing}: make room, or set HF_HOME to a "
                "larger disk"
            )


def pull(order: Order, progress: Progress | None = None) -> str:
    """Fetches and makes what an order says; returns the path of the file to open.

    Every step goes on, or begins anew, where an earlier run was stopped; what is not needed any more is removed.

    Args:
        progress: called with (done, all, what of) while it converts and packs.

    Raises HubError, ModelFormatError for a model that cannot be taken, SmallThinkerError where converting needs the
    [convert] extra, OSError such as a full disk.
    """
    if is_ready(order.target):
        return order.target
    check_room(order)
    logger.info("%s", order.describe())
    paths = [download(order.files, name) for name in order.choice.names]
    report = progress or (lambda done, total, name: None)
    source, temporary = paths[0], f"{os.path.splitext(order.target)[0]}.gguf"
    if order.choice.kind == "checkpoint":
        source = os.path.dirname(paths[order.choice.names.index("config.json")])
    if order.choice.kind == "checkpoint" or (order.choice.kind == "gguf" and not runs(source)):
        if not is_ready(temporary):
            convert(source, temporary, progress=report)
        source = temporary
    if order.pack:
        pack(source, order.target, lambda done, total: report(done, total, "experts packed"))
        if source == temporary:
            os.unlink(temporary)
        return order.target
    return source


def runs(path: str) -> bool:
    """Whether this version runs all of a GGUF file's tensor types."""
    try:
        with GGUFFile(path):
            return True
    except ModelFormatError:
        return False
