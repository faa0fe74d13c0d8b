"""Ids become files: what is fetched, what is not, what a second run needs, and one line for whatever goes wrong."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download
from loopback import FIXTURES, Loopback, Repository

from mtp_mlx.checkpoint import INDEX, read_header
from mtp_mlx.errors import CheckpointError
from mtp_mlx.hub import Remote, Snapshot, download, find
from mtp_mlx.loading import fetch, load_pair

DENSE = "google/gemma-4-31B-it"
SHARDED = "google/gemma-4-26B-A4B-it"
WEIGHTS = "model.safetensors"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens there any more."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        find(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def held(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_read_is_fetched(hub: Loopback) -> None:
    read = ["chat_template.jinja", "README.md", "mtp/config.json", "mtp/weights.safetensors", "model-mtp.safetensors"]
    unread = [
        "original/consolidated.00.pth", "original/params.json", "pytorch_model.bin", "model.gguf", "onnx/model.onnx",
        "consolidated.safetensors", "modeling_gemma.py", "tokenizer.py", "training_args.bin", "logs/a.json",
        "model-00001-of-00002.safetensors",
    ]  # fmt: skip
    hub.add("a/b", FIXTURES / "gemma4_keqv", dict.fromkeys((*read, *unread), b"{}"))
    folder = find("a/b")
    own = {path.name for path in (FIXTURES / "gemma4_keqv").iterdir() if path.is_file()} - {"golden.npz"}
    assert held(folder) == own | set(read)
    assert not {request.file for request in hub.log} & set(unread)


def test_the_shards_are_those_of_the_index(hub: Loopback) -> None:
    hub.add("a/b", FIXTURES / "gemma4_moe", {WEIGHTS: b"another form of the model"})
    assert {name for name in held(find("a/b")) if name.endswith(".safetensors")} == set(SHARDS)


def test_a_second_run_asks_nobody(hub: Loopback) -> None:
    first = load_pair(DENSE, dtype=mx.float32)
    assert first.drafter == f"{DENSE}-assistant"
    asked = len(hub.log)
    second = load_pair(DENSE, dtype=mx.float32)
    assert (second.drafter, len(hub.log)) == (first.drafter, asked)


def test_what_is_complete_runs_offline(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(DENSE)
    offline(monkeypatch)
    assert load_pair(DENSE).drafter == f"{DENSE}-assistant"
    assert "not in the local cache, and HF_HUB_OFFLINE" in refusal(SHARDED)


def test_a_new_commit_is_fetched_when_asked_for_and_only_what_changed(hub: Loopback) -> None:
    old = find(SHARDED)
    hub.add(SHARDED, FIXTURES / "gemma4_moe", {"generation_config.json": b"{}"})
    assert find(SHARDED) == old
    before = hub.sent(SHARDED)
    new = download(SHARDED).folder
    assert find(SHARDED) == new != old
    assert hub.sent(SHARDED) - before == 2


class Interrupted(BaseException):
    """Ctrl-C."""


def interrupt(hub: Loopback, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """End a download of the sharded model as Ctrl-C would, in the middle of a file."""

    def stopping(repo: str, name: str, **options: Any) -> str:
        if name == file:
            raise Interrupted
        return str(hf_hub_download(repo, name, **options))

    with monkeypatch.context() as patch:
        patch.setattr("mtp_mlx.hub.hf_hub_download", stopping)
        with pytest.raises(Interrupted):
            find(SHARDED)


def test_a_download_goes_on_where_it_was_interrupted(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(hub, monkeypatch, SHARDS[1])
    offline(monkeypatch)
    assert f"{SHARDS[1]} and 1 more of {SHARDED} is not in the local cache" in refusal(SHARDED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = hub.sent(SHARDED)
    folder = find(SHARDED)
    rest = sum((folder / name).stat().st_size for name in SHARDS[1:])
    assert hub.sent(SHARDED) - first == rest
    assert all(read_header(folder / name).names for name in SHARDS)


def test_a_connection_that_breaks_is_taken_up_again(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    size = (FIXTURES / "gemma4_keqv" / WEIGHTS).stat().st_size
    hub.fail(DENSE, WEIGHTS, after=105_000)
    folder = find(DENSE)
    assert (folder / WEIGHTS).read_bytes() == (FIXTURES / "gemma4_keqv" / WEIGHTS).read_bytes()
    assert hub.sent(DENSE, WEIGHTS) == size + 5_000
    assert hub.ranges(DENSE, WEIGHTS)[0] == "bytes=100000-"


def test_a_file_cut_short_on_the_disk_is_fetched_again(hub: Loopback) -> None:
    blob = (find(DENSE) / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:1000])
    before = hub.sent(DENSE)
    folder = find(DENSE)
    assert read_header(folder / WEIGHTS).names
    assert hub.sent(DENSE) - before == (FIXTURES / "gemma4_keqv" / WEIGHTS).stat().st_size


def test_what_another_program_has_fetched_is_used(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot_download(SHARDED, allow_patterns=["*.json", "model*.safetensors"])
    shutil.rmtree(hub.home / "hub" / "models--google--gemma-4-26B-A4B-it" / "trees")
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    unreachable(monkeypatch)
    folder = find(SHARDED)
    assert set(SHARDS) < held(folder)
    (folder / SHARDS[2]).unlink()
    assert f"{SHARDS[2]} of {SHARDED} is not in the local cache, and the hub at" in refusal(SHARDED)


def _absent(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    del hub.repositories[DENSE]


def _absent_to_a_user(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    del hub.repositories[DENSE]
    patch.setenv("HF_TOKEN", "hf_someone")


def _gated(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    hub.repositories[DENSE].gated = True


def _gated_to_a_user(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    hub.repositories[DENSE].gated = True
    patch.setenv("HF_TOKEN", "hf_someone")


def _nobody_there(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    unreachable(patch)


def _silent(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.fail(DENSE, wait=0.6)


def _down(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    hub.fail(DENSE, status=503)


def _offline(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    offline(patch)


def _serve(**files: bytes | None) -> Callable[[Loopback, pytest.MonkeyPatch], None]:
    """The model with other files; None for one that is not there."""

    def change(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
        own = {name: content for name, content in hub.repositories[DENSE].files.items() if name not in files}
        hub.repositories[DENSE] = Repository(DENSE, own | {name: c for name, c in files.items() if c is not None})

    return change


def _index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)}}).encode()


def _no_space(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mtp_mlx.hub.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 900_000, 100_000))


def _disk_full(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("mtp_mlx.hub.hf_hub_download", full)


def _read_only(hub: Loopback, patch: pytest.MonkeyPatch) -> None:
    hub.home.parent.joinpath("file").write_text("")
    patch.setattr(constants, "HF_HUB_CACHE", str(hub.home.parent / "file" / "hub"))


FAILURES: dict[str, tuple[Callable[[Loopback, pytest.MonkeyPatch], None], str]] = {
    "no such repository": (_absent, "neither a folder here nor a model on the hub that is open to you; check the name"),
    "no such repository, with a token": (_absent_to_a_user, "neither a folder here nor a model on the hub"),
    "gated": (
        _gated,
        f"is gated; accept the licence at https://huggingface.co/{DENSE} and log in with `hf auth login`",
    ),
    "gated, with a token": (_gated_to_a_user, "is gated; accept the licence at"),
    "no network": (_nobody_there, "not in the local cache, and the hub at http://127.0.0.1:9 does not answer"),
    "no answer in time": (_silent, "does not answer (timed out)"),
    "the hub is down": (_down, "cannot serve google/gemma-4-31B-it at present (503); try again later"),
    "offline": (_offline, "not in the local cache, and HF_HUB_OFFLINE forbids"),
    "a shard that is not there": (
        _serve(**{INDEX: _index(WEIGHTS, "model-2.safetensors")}),
        f"has no model-2.safetensors, which its {INDEX} names",
    ),
    "only pickles": (
        _serve(**{WEIGHTS: None, "pytorch_model.bin": b"", "model.gguf": b""}),
        "has no safetensors, only .bin, .gguf; only safetensors are read",
    ),
    "pickles in the index": (_serve(**{INDEX: _index("pytorch_model.bin")}), "not safetensors; only those are read"),
    "shards outside": (_serve(**{INDEX: _index("../../x.safetensors")}), "'../../x.safetensors', which is outside"),
    "shards anywhere": (_serve(**{INDEX: _index("/etc/x.safetensors")}), "'/etc/x.safetensors', which is outside"),
    "shards on Windows": (_serve(**{INDEX: _index("..\\x.safetensors")}), "which is outside the folder; refused"),
    "shards with a zero": (_serve(**{INDEX: _index("x\0.safetensors")}), "which is outside the folder; refused"),
    "an index that is no index": (_serve(**{INDEX: b"[]"}), "expected an object"),
    "no space": (_no_space, "GB are free; free some, or set HF_HOME"),
    "the disk is full": (_disk_full, "the disk is full"),
    "a cache that cannot be written": (_read_only, "could not be downloaded"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_is_one_clear_line(hub: Loopback, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, message = FAILURES[failure]
    break_it(hub, monkeypatch)
    said = refusal(DENSE)
    assert message in said and "gemma-4-31B-it" in said


@pytest.mark.parametrize("name", ["a/b--c", "a/" + "b" * 200, "über/model", "a/b c", "a/.."])
def test_names_that_no_hub_allows_are_refused(hub: Loopback, name: str) -> None:
    assert "nor a name that the hub allows" in refusal(name)
    assert not hub.log


def test_weights_of_a_model_that_cannot_be_run_are_not_fetched(hub: Loopback) -> None:
    hub.add("a/llama", FIXTURES / "gemma4_keqv", {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(CheckpointError, match="'llama'; supported targets"):
        load_pair("a/llama")
    assert hub.sent("a/llama", WEIGHTS) == 0


def test_a_repository_is_read_in_parts(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_someone")
    source = FIXTURES / "gemma4_moe"
    remote = Remote.open(SHARDED)
    assert remote.files[SHARDS[0]] == (source / SHARDS[0]).stat().st_size
    assert remote.json(INDEX) == json.loads((source / INDEX).read_text())
    monkeypatch.setattr("mtp_mlx.hub._START", 1000)  # shorter than a header here
    header = remote.header(SHARDS[1])
    assert header == read_header(source / SHARDS[1])
    _, entry = min(header.tensors.items(), key=lambda item: item[1].begin)
    assert remote.read(SHARDS[1], entry.begin, entry.end) == (source / SHARDS[1]).read_bytes()[entry.begin : entry.end]
    assert hub.sent(SHARDED, SHARDS[1]) == entry.end  # every byte once
    assert remote.read(SHARDS[1], 7, 7) == b""
    tokens = {request.authorized for request in hub.log if request.status == 206}
    assert tokens == {False}, "a token left the hub"
    assert all(request.authorized for request in hub.log if request.status != 206)


def test_a_range_goes_on_where_the_connection_broke(hub: Loopback) -> None:
    content = (FIXTURES / "gemma4_keqv" / WEIGHTS).read_bytes()
    hub.fail(DENSE, WEIGHTS, after=70_000, times=2)
    assert Remote.open(DENSE).read(WEIGHTS, 1000, 301_000) == content[1000:301_000]
    assert len(hub.ranges(DENSE, WEIGHTS)) == 6  # each is first sent elsewhere
    assert hub.sent(DENSE, WEIGHTS) < 310_000


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "the whole file": ({"whole": True}, "the server sent others (status 200)"),
    "too few bytes": ({"short": 5}, "the server sent others (status 206)"),
    "an error": ({"status": 500}, "at present (500)"),
    "nothing": ({"after": 0}, "does not answer"),
}


@pytest.mark.parametrize("answer", WRONG)
def test_another_answer_than_the_range_is_refused(hub: Loopback, answer: str) -> None:
    fault, message = WRONG[answer]
    remote = Remote.open(DENSE)
    hub.fail(DENSE, WEIGHTS, times=2, **fault)
    with pytest.raises(CheckpointError) as caught:
        remote.read(WEIGHTS, 0, 50_000)
    assert message in str(caught.value)


def test_what_a_repository_does_not_have_is_not_asked_for(hub: Loopback) -> None:
    remote = Remote.open(DENSE)
    for read in (
        lambda: remote.read("../x.safetensors", 0, 1),
        lambda: remote.header("x.safetensors"),
        lambda: remote.json("x.json"),
        lambda: remote.read(WEIGHTS, 0, 10**9),
        lambda: remote.read(WEIGHTS, -1, 1),
    ):
        with pytest.raises(CheckpointError, match=r"has no file|and none at"):
            read()
    assert len(hub.log) == 1


@pytest.mark.parametrize("start", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0{}"])
def test_a_damaged_header_is_named(hub: Loopback, start: bytes) -> None:
    hub.add("a/b", None, {WEIGHTS: start})
    with pytest.raises(CheckpointError, match="of a/b is damaged"):
        Remote.open("a/b").header(WEIGHTS)


def test_a_snapshot_knows_what_is_missing(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Snapshot.held(SHARDED) is None
    interrupt(hub, monkeypatch, SHARDS[2])
    snapshot = Snapshot.held(SHARDED)
    assert snapshot is not None and snapshot.missing() == [SHARDS[2]]
