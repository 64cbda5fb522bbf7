"""Models of the Hugging Face Hub: the real client against a server on this machine, with what goes wrong out there.

Each call runs in a process of its own, as users' do, because the client reads its variables when it is imported.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoint_files
import gguf_files
import hub_server
import pytest
from hub_server import Hub

from smallthinker_edge import HubError, SmallThinker
from smallthinker_edge.files import hub as hub_module
from smallthinker_edge.files.pack import pack
from smallthinker_edge.files.pull import choose, type_of

MIB = 1 << 20
REPO = "smalls/thinker-GGUF"
SHAPE = {"n_layers": 2, "context_length": 256}
OPEN = "import sys; from smallthinker_edge import SmallThinker\nwith SmallThinker.from_pretrained(*sys.argv[1:]) as m: "


class User:
    """Someone's machine: a home of its own, and what is run there."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.env = kept | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "*"}

    def start(self, *command: object, **env: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *map(str, command)], env=self.env | env, stdout=pipe, stderr=pipe, text=True
        )

    def python(self, code: str, *arguments: object, **env: str) -> str:
        """What a script prints; it must end well."""
        process = self.start("-c", code, *arguments, **env)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return out.strip()

    def run(self, *arguments: object, **env: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of the command line."""
        process = self.start("-m", "smallthinker_edge", *arguments, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out.strip(), err

    def fails(self, *arguments: object, **env: str) -> str:
        """The one line that the command line fails with."""
        code, out, err = self.run(*arguments, **env)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, out, len(errors)) == (1, "", 1), err
        assert "Traceback" not in err
        return errors[0]

    def blobs(self) -> list[Path]:
        return sorted(self.home.glob("hub/models--*/blobs/*"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Path(gguf_files.write_model(tmp_path_factory.mktemp("m") / "m.gguf", **SHAPE)).read_bytes()


@pytest.fixture
def large(hub: Hub, model: bytes) -> bytes:
    """What the model's file holds now: the client keeps what came in pieces of 10 MiB."""
    hub.files[REPO]["tiny-Q4_0.gguf"] = data = model + random.Random(0).randbytes(24 * MIB)
    return data


@pytest.fixture
def hub(model: bytes) -> Iterator[Hub]:
    files = {"README.md": b"# A model\n", "tiny-Q4_0.gguf": model, "tiny-F16.gguf": model + b"other"}
    with hub_server.serving(Hub({REPO: files})) as served:
        yield served
        assert not served.tokens_to_storage, "the token is the Hub's, and no one else's"


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


def files_fetched(hub: Hub) -> list[str]:
    return [path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET" and "/storage/" in path]


# Which model


@pytest.mark.parametrize(
    ("names", "pattern", "chosen"),
    [
        (["a-Q8_0.gguf", "a-Q4_0.gguf", "a-Q4_K_M.gguf"], None, "a-Q4_0.gguf"),
        (["a-Q8_0.gguf", "a.Q4_K_M.gguf", "a-Q2_K.gguf"], None, "a.Q4_K_M.gguf"),
        (["a-Q4_0.gguf", "a.stpk"], None, "a.stpk"),
        (["a-Q4_0.gguf", "a.stpk"], "*.gguf", "a-Q4_0.gguf"),
        (["a-Q4_0.gguf", "a-Q8_0.gguf"], "*Q8*", "a-Q8_0.gguf"),
        (["a-IQ3_XXS.gguf", "config.json", "model.safetensors"], None, "config.json"),
        (["a-IQ3_XXS.gguf", "a-imatrix.gguf", "mmproj-F16.gguf"], None, "a-IQ3_XXS.gguf"),
        (["b/x-q5_k_m.gguf", "a-IQ3_XXS.gguf"], None, "b/x-q5_k_m.gguf"),
        (["a-Q4_0-00002-of-00002.gguf", "a-Q4_0-00001-of-00002.gguf"], None, "a-Q4_0-00001-of-00002.gguf"),
    ],
)
def test_a_small_file_that_runs_fast_is_chosen(names: list[str], pattern: str | None, chosen: str) -> None:
    assert choose(dict.fromkeys(names, 1), pattern).names[0] == chosen


def test_a_checkpoint_is_all_that_convert_reads_and_nothing_else() -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json",
             "model.safetensors.index.json", "chat_template.jinja", "model_lm_head.pt", "pytorch_model.bin",
             "onnx/model.safetensors", "README.md", "modeling_smallthinker.py"]  # fmt: skip
    choice = choose(dict.fromkeys(names, 1))
    assert choice.kind == "checkpoint"
    assert set(choice.names) == set(names[:7])


def test_what_holds_no_model_is_refused_with_what_there_is() -> None:
    with pytest.raises(HubError, match=r"no model that '\*Q2\*' matches; it has: a-Q4_0.gguf"):
        choose({"a-Q4_0.gguf": 1, "README.md": 1}, "*Q2*")
    with pytest.raises(HubError, match=r"a-Q4_0-00002-of-00003\.gguf is missing"):
        choose({"a-Q4_0-00001-of-00003.gguf": 1, "a-Q4_0-00003-of-00003.gguf": 1})


def test_types_are_told_by_names() -> None:
    found = [
        type_of(f"d-F16/Some-4B-{name}.gguf") for name in ("q4_k_m", "Q4_0-00001-of-00002", "IQ4_XS", "bf16", "v2")
    ]
    assert found == ["Q4_K_M", "Q4_0", "IQ4_XS", "BF16", ""]


# Pulling


def test_a_gguf_is_fetched_packed_and_opened(hub: Hub, user: User, model: bytes, tmp_path: Path) -> None:
    code, path, err = user.run("pull", REPO)
    assert code == 0, err
    assert "tiny-Q4_0.gguf" in err
    assert "to fetch: 0.00 GiB" in err
    (tmp_path / "m.gguf").write_bytes(model)
    pack(tmp_path / "m.gguf", tmp_path / "m.stpk")
    assert Path(path).read_bytes() == (tmp_path / "m.stpk").read_bytes()
    assert files_fetched(hub) == ["tiny-Q4_0.gguf"]
    hub.requests.clear()
    text = user.python(OPEN + "print(m.paths[0], m.generate('hello', max_tokens=3).text)", REPO, "1GiB")
    with SmallThinker(path) as opened:
        assert text == f"{path} {opened.generate('hello', max_tokens=3).text}".strip()
    assert not files_fetched(hub), "what is there is not fetched again"


def test_the_cache_is_the_clients_own(hub: Hub, user: User, model: bytes) -> None:
    path = user.run("pull", REPO, "--no-pack", "--file", "*Q4_0*")[1]
    theirs = user.python(
        "import sys, huggingface_hub as h; print(h.hf_hub_download(sys.argv[1], 'tiny-Q4_0.gguf', revision='main'))",
        REPO,
    )
    assert path == theirs
    assert Path(path).read_bytes() == model
    assert files_fetched(hub) == ["tiny-Q4_0.gguf"]
    assert [blob.name for blob in user.blobs()] == [hub_server.etag(model)]


def test_without_a_budget_a_gguf_is_opened_as_it_is(hub: Hub, user: User) -> None:
    assert user.python(OPEN + "print(m.paths[0])", REPO).endswith("/tiny-Q4_0.gguf")
    assert not list(user.home.rglob("*.stpk"))


def test_all_parts_of_a_split_file_are_fetched(hub: Hub, user: User, tmp_path: Path) -> None:
    parts = gguf_files.write_split_model(tmp_path / "tiny-Q8_0.gguf", types="Q8_0", **SHAPE)
    hub.files[REPO] = {Path(part).name: Path(part).read_bytes() for part in parts}
    path = user.run("pull", REPO)[1]
    assert path.endswith("/tiny-Q8_0.stpk")
    with SmallThinker(path) as ours, SmallThinker(parts[0]) as source:
        assert ours.generate("hello", max_tokens=4).tokens == source.generate("hello", max_tokens=4).tokens


def test_a_packed_file_is_taken_as_it_is(hub: Hub, user: User, tmp_path: Path) -> None:
    gguf_files.write_model(tmp_path / "m.gguf", **SHAPE)
    pack(tmp_path / "m.gguf", tmp_path / "m.stpk")
    hub.files[REPO]["ready.stpk"] = (tmp_path / "m.stpk").read_bytes()
    assert user.run("pull", REPO)[1].endswith("/ready.stpk")
    assert files_fetched(hub) == ["ready.stpk"]


@pytest.mark.parametrize("kind", ["checkpoint", "types that do not run"])
def test_what_does_not_run_is_converted_and_packed(kind: str, hub: Hub, user: User, tmp_path: Path) -> None:
    if kind == "checkpoint":
        folder = tmp_path / "checkpoint"
        checkpoint_files.write_checkpoint(folder)
        hub.files[REPO] = {path.name: path.read_bytes() for path in folder.iterdir()}
    else:
        path = gguf_files.write_model(
            tmp_path / "m.gguf", types="IQ3_S", **SHAPE | {"d_model": 256, "d_ffn": 256, "head_dim": 64}
        )
        hub.files[REPO] = {"tiny-IQ3_S.gguf": Path(path).read_bytes()}
    code, path, err = user.run("pull", REPO)
    assert code == 0, err
    assert path.endswith(".stpk")
    assert [found.name for found in Path(path).parent.iterdir()] == [Path(path).name], "the way to it is removed"
    assert user.python(OPEN + "print(len(m.generate('hello', max_tokens=3).tokens))", REPO, "1GiB") in "123"


# What goes wrong


def spans_fetched(hub: Hub) -> list[str]:
    return [span for method, path, span in hub.requests if "/storage/" in path and method == "GET"]


def test_a_dropped_connection_goes_on_where_it_was(hub: Hub, user: User, large: bytes) -> None:
    hub.drop_after, hub.drops = 11 * MIB, 2
    assert Path(user.run("pull", REPO, "--no-pack")[1]).read_bytes() == large
    assert spans_fetched(hub) == ["", f"bytes={10 * MIB}-", f"bytes={20 * MIB}-"]


def test_a_killed_download_goes_on_where_it_was(hub: Hub, user: User, large: bytes) -> None:
    hub.drop_after, hub.drops = 11 * MIB, 1
    process = user.start("-m", "smallthinker_edge", "pull", REPO, "--no-pack")
    while not user.blobs() or user.blobs()[0].stat().st_size < 10 * MIB:  # it waits a second after a drop
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [blob.name for blob in user.blobs()] == [hub_server.etag(large) + ".smallthinker.part"]
    hub.drops = 0
    hub.requests.clear()
    code, path, err = user.run("pull", REPO, "--no-pack")
    assert code == 0
    assert "to fetch: 0.01 GiB" in err, "14 of 24 MiB"
    assert Path(path).read_bytes() == large
    assert spans_fetched(hub) == [f"bytes={10 * MIB}-"]
    assert [blob.name for blob in user.blobs()] == [hub_server.etag(large)]


def test_a_server_without_ranges_sends_all_again(hub: Hub, user: User, large: bytes) -> None:
    hub.drop_after, hub.drops, hub.no_ranges = 11 * MIB, 1, True
    assert Path(user.run("pull", REPO, "--no-pack")[1]).read_bytes() == large


def test_two_at_once_fetch_a_file_once(hub: Hub, user: User, model: bytes) -> None:
    both = [user.start("-m", "smallthinker_edge", "pull", REPO, "--no-pack") for _ in range(2)]
    assert {process.communicate(timeout=60)[0] for process in both} != {""}
    assert [process.returncode for process in both] == [0, 0]
    assert hub.sent == len(model)


def test_a_wrong_checksum_leaves_nothing(hub: Hub, user: User, model: bytes) -> None:
    hub.damage = {"tiny-Q4_0.gguf"}
    assert "came damaged" in user.fails("pull", REPO)
    assert user.blobs() == []
    hub.damage = set()
    assert user.run("pull", REPO)[0] == 0


def test_a_small_file_is_checked_too(hub: Hub, user: User, tmp_path: Path) -> None:
    checkpoint_files.write_checkpoint(tmp_path / "c")
    hub.files[REPO] = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    hub.damage = {"config.json"}
    assert "config.json came damaged" in user.fails("pull", REPO)


def test_names_that_lead_elsewhere_are_not_looked_at(hub: Hub, user: User, model: bytes) -> None:
    hub.files[REPO] = {"../../../up-Q4_0.gguf": model, "/tmp/x-Q4_0.gguf": model, "a/../x-Q4_0.gguf": model}
    assert "holds no model; it has: no .gguf" in user.fails("pull", REPO)


def test_a_private_repository_needs_its_token(hub: Hub, user: User) -> None:
    hub.private = {REPO}
    assert "private: look at its name, and at HF_TOKEN" in user.fails("pull", REPO)
    assert "HF_TOKEN" in user.fails("pull", REPO, HF_TOKEN="hf_wrong")
    assert user.run("pull", REPO, HF_TOKEN=hub.token)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([REPO], 503, "the server answers 503"),
        ([REPO + "-of-nobody"], 0, "does not exist, or is private"),
        ([f"{REPO}@v9"], 0, "no such branch, tag or commit"),
        ([REPO, "--file", "*Q2*"], 0, "no model that '*Q2*' matches"),
    ],
)
def test_errors_are_one_line_that_helps(arguments: list[str], status: int, says: str, hub: Hub, user: User) -> None:
    hub.status = status
    assert says in user.fails("pull", *arguments)
    assert not user.blobs()


def test_a_gated_repository_is_told_so(hub: Hub, user: User) -> None:
    hub.gated = {REPO}
    assert "accept its conditions" in user.fails("pull", REPO, HF_TOKEN=hub.token)


def test_a_name_that_is_none_is_wrong_usage(user: User) -> None:
    assert user.run("pull", "model.gguf")[0] == 2


def test_nothing_listens(hub: Hub, user: User) -> None:
    user.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert "cannot be had from http://127.0.0.1:9" in user.fails("pull", REPO)


def test_offline_takes_what_the_cache_has(hub: Hub, user: User) -> None:
    assert "HF_HUB_OFFLINE" in user.fails("pull", REPO, HF_HUB_OFFLINE="1")
    path = user.run("pull", REPO)[1]
    hub.requests.clear()
    assert user.run("pull", REPO, HF_HUB_OFFLINE="1")[1] == path
    os.unlink(path)
    assert user.run("pull", REPO, HF_HUB_OFFLINE="1")[1] == path, "packed again from the cached file"
    assert not hub.requests
    user.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert user.run("pull", REPO)[1] == path
    assert "it has: tiny-Q4_0.gguf" in user.fails("pull", REPO, "--file", "*F16*", HF_HUB_OFFLINE="1")


def test_a_full_disk_leaves_the_commit_that_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "repo_folder", lambda repo: tmp_path)
    reference = tmp_path / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("1" * 40)
    found = hub_module.Listing("org/name", "main", "2" * 40, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            hub_module._remember(found)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert reference.read_text() == "1" * 40
    hub_module._remember(found)
    assert reference.read_text() == "2" * 40


def test_a_full_disk_is_told_before_anything_is_fetched(hub: Hub, user: User) -> None:
    code = (
        "import shutil, sys, collections; from smallthinker_edge.cli import main\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('U', 'total used free')(1, 1, 100_000)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = user.start("-c", code, "pull", REPO)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "free at" in err.splitlines()[-1]
    assert not files_fetched(hub)


def test_a_file_of_an_earlier_layout_is_packed_again(hub: Hub, user: User) -> None:
    path = Path(user.run("pull", REPO)[1])
    good = path.read_bytes()
    path.write_bytes(good.replace(b"tile16-", b"tile15-"))
    assert user.run("pull", REPO)[1] == str(path)
    assert path.read_bytes() == good


def test_a_file_that_is_offered_by_xet_is_fetched_by_http(hub: Hub, user: User, model: bytes) -> None:
    hub.xet = True
    assert Path(user.run("pull", REPO, "--no-pack")[1]).read_bytes() == model
    assert not [path for _, path, _ in hub.requests if "xet" in path]


# Planning


def test_plan_reads_only_the_header(hub: Hub, user: User, tmp_path: Path) -> None:
    big = gguf_files.write_model(tmp_path / "big-Q8_0.gguf", types="Q8_0", n_layers=4, d_model=512, d_ffn=1024)
    data = Path(big).read_bytes()
    hub.files[REPO]["big-Q8_0.gguf"] = data
    address = f"hf:{REPO}/big-Q8_0.gguf"
    code = (
        "import sys; from smallthinker_edge.files import hub\nhub.FIRST_BYTES = 4096\n"
        "from smallthinker_edge.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    process = user.start("-c", code, "plan", address, "--memory", "1GiB", "--context", "64", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert hub.sent < 100_000 < len(data) // 50
    spans = [span for method, path, span in hub.requests if "/storage/" in path]
    assert spans[:2] == ["bytes=0-4095", "bytes=4096-8191"]
    remote, local = json.loads(out), {}
    for way, flags in (("as it is", []), ("packed", ["--packed"])):
        local[way] = json.loads(user.run("plan", big, "--memory", "1GiB", "--context", "64", "--json", *flags)[1])
    same = ("weights", "kv_cache", "buffers", "slot_bytes", "least_slots", "limit")
    assert {way: [plan[key] for key in same] for way, plan in remote.items()} == {
        way: [plan[key] for key in same] for way, plan in local.items()
    }
    pack(big, tmp_path / "m.stpk")
    packed = json.loads(user.run("plan", tmp_path / "m.stpk", "--memory", "1GiB", "--context", "64", "--json")[1])
    assert [remote["packed"][key] for key in same] == [packed[key] for key in same]
    assert not user.blobs()


def test_plan_says_what_fits(hub: Hub, user: User, tmp_path: Path) -> None:
    big = gguf_files.write_model(tmp_path / "big.gguf", types="F32", n_layers=6, d_model=512, d_ffn=1024)
    hub.files[REPO]["big-F32.gguf"] = Path(big).read_bytes()
    code, out, _ = user.run("plan", f"hf:{REPO}/big-F32.gguf", "--memory", "200MiB", "--context", "64")
    assert code == 0
    assert "does not fit" in out.partition("packed:")[0]
    assert "expert slots" in out.partition("packed:")[2]
    code, out, _ = user.run("plan", f"hf:{REPO}/big-F32.gguf", "--memory", "20MiB", "--context", "64")
    assert (code, out.count("does not fit")) == (1, 2)


def test_plan_takes_split_and_packed_files(hub: Hub, user: User, tmp_path: Path) -> None:
    parts = gguf_files.write_split_model(tmp_path / "tiny-Q8_0.gguf", types="Q8_0", **SHAPE)
    gguf_files.write_model(tmp_path / "m.gguf", **SHAPE)
    pack(tmp_path / "m.gguf", tmp_path / "m.stpk")
    hub.files[REPO] = {Path(part).name: Path(part).read_bytes() for part in [*parts, tmp_path / "m.stpk"]}
    code, out, err = user.run("plan", f"hf:{REPO}/{Path(parts[1]).name}", "--memory", "1GiB")
    assert (code, out.count("total")) == (0, 2), err
    code, out, err = user.run("plan", f"hf:{REPO}", "--memory", "1GiB")
    assert (code, out.count("expert slots")) == (0, 1), err
    assert "m.stpk" in out


@pytest.mark.parametrize("kind", ["damaged", "cut", "no ranges", "missing"])
def test_plan_refuses_what_is_no_header(kind: str, hub: Hub, user: User, model: bytes) -> None:
    data = bytearray(model)
    if kind == "damaged":
        data[8:16] = b"\xff" * 8
    elif kind == "cut":
        del data[3000:]
    hub.files[REPO]["bad.gguf"] = bytes(data)
    hub.no_ranges = kind == "no ranges"
    name = "bad.gguf" if kind != "missing" else "none.gguf"
    if kind == "no ranges":
        assert user.run("plan", f"hf:{REPO}/{name}")[0] == 0, "the first bytes are all that is wanted"
    else:
        assert name in user.fails("plan", f"hf:{REPO}/{name}")


def test_plan_of_a_checkpoint_is_wrong_usage(hub: Hub, user: User, tmp_path: Path) -> None:
    checkpoint_files.write_checkpoint(tmp_path / "c")
    hub.files[REPO] = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert user.run("plan", f"hf:{REPO}")[0] == 2


def test_without_the_client_it_is_said_what_to_install(user: User) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from smallthinker_edge.cli import main; sys.exit(main(['pull', 'a/b']))"
    )
    process = user.start("-c", code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "pip install 'smallthinker_edge[hub]'" in err
