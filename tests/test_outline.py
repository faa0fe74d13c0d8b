"""A look at a checkpoint tells what loading it would take, finds what loading would refuse, and reads no weights."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import FIXTURES, QWEN, VARIANTS, program
from huggingface_hub import close_session
from loopback import Loopback
from mlx_lm.convert import convert

from mtp_mlx.errors import CheckpointError, MTPError, PairError, RequestError
from mtp_mlx.loading import load_pair
from mtp_mlx.outline import Context, Outline, outline

CONFIGS = FIXTURES / "configs"
KB = 1000


def bare(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def published(name: str, folder: Path, **changes: Any) -> Outline:
    """What is told of a published config.json alone."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())["config"]
    return outline(bare(folder, config | changes), "auto" if name.startswith("Qwen") else "none")


def at(found: Outline, tokens: int) -> Context:
    return next(entry for entry in found.contexts if entry.tokens == tokens)


# --------------------------------------------------------------------------- published models, by hand


def test_gemma_12b_is_what_its_config_says(tmp_path: Path) -> None:
    found = published("gemma-4-12B-it", tmp_path)
    width, inner = 3840, 15360
    every = 3 * width * inner + 4 * width + 1  # the feed-forward part, four norms, the scalar
    sliding = 2 * width * 16 * 256 + 2 * width * 8 * 256 + 2 * 256 + every
    full = 2 * width * 16 * 512 + width * 1 * 512 + 2 * 512 + every  # values are made from the keys
    parameters = 262144 * width + 40 * sliding + 8 * full + width
    assert found.weights.parameters == parameters == found.weights.active  # 11.9 B; the embedding is the output head
    assert found.weights.nbytes == 2 * parameters and found.precision == "bfloat16"
    assert (found.layers, found.kept, found.context) == ({"window of 1024": 40, "full attention": 8}, 48, 262144)
    windows = 40 * 2 * 8 * (1024 + 32) * 256 * 2  # layers, keys and values, heads, slots, size, bytes
    assert at(found, 4096).cache == windows + 8 * 2 * 1 * 4096 * 512 * 2
    assert at(found, 131072).cache == windows + 8 * 2 * 1 * 131072 * 512 * 2
    assert at(found, 4096).plain_read == 2 * parameters + at(found, 4096).cache
    assert "config.json alone" in found.source and found.quantization == "none"


def test_the_same_in_4_bits_with_keys_in_8(tmp_path: Path) -> None:
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    config = json.loads((CONFIGS / "gemma-4-12B-it.json").read_text())["config"] | {"quantization": settings}
    found, plain = outline(bare(tmp_path, config), "none", kv_bits=8), published("gemma-4-12B-it", tmp_path)
    norms = 48 * (4 * 3840 + 1) + 40 * 2 * 256 + 8 * 2 * 512 + 3840
    packed = plain.weights.parameters - norms
    assert found.weights.parameters == plain.weights.parameters
    assert found.weights.nbytes == packed // 2 + packed // 64 * 4 + 2 * norms  # 4.5 bits each: 6.7 GB
    assert found.weights.nbytes == pytest.approx(6.7e9, rel=0.01)
    windows, full = 40 * 2 * 8 * 1056 * 256 * 2, 8 * 2 * 4096 * (512 + 512 // 64 * 4)
    assert at(found, 4096).cache == windows + full
    assert found.quantization == "affine, 4 bits in groups of 64" and found.kv_bits == 8


def test_the_e2b_assistant_is_what_its_config_says(tmp_path: Path) -> None:
    found = published("gemma-4-E2B-it-assistant", tmp_path)
    width, inner = 256, 2048
    every = 3 * width * inner + 4 * width + 1
    layers = 3 * (2 * width * 4 * 256 + 256 + every) + 2 * width * 4 * 512 + 512 + every
    table, order, centroids = 262144 * width, 262144, 2048 * width
    ends = width * 2 * 1536 + 1536 * width + width
    assert found.weights.parameters == table + order + centroids + layers + ends == pytest.approx(78e6, rel=0.005)
    # Of the table only the rows of 32 in 2048 groups are read.
    assert found.weights.read == 2 * (table // 64 + centroids + layers + ends) + 4 * order
    assert found.role == "drafter" and found.kept == 0 and not found.estimates
    assert at(found, 4096).cache == 0
    assert found.drafter is None and "drafter by itself" in found.drafter_reason


def test_a_drafter_for_a_drafter_is_refused() -> None:
    drafter = str(FIXTURES / "gemma4_ple" / "assistant")
    assert outline(drafter, "none").role == "drafter"
    with pytest.raises(RequestError, match=r"is a drafter itself and gets none, so --drafter other says nothing"):
        outline(drafter, "other")


def test_qwen_27b_is_what_its_config_says(tmp_path: Path) -> None:
    found = published("Qwen3.6-27B", tmp_path)
    width, inner, table = 5120, 17408, 248320 * 5120
    every = 3 * width * inner + 2 * width
    linear = width * (10240 + 6144 + 48 + 48) + 6144 * width + 10240 * 4 + 48 + 48 + 128 + every
    full = width * (2 * 24 * 256 + 2 * 4 * 256) + 24 * 256 * width + 2 * 256 + every
    parameters = 2 * table + 48 * linear + 16 * full + width
    assert found.weights.parameters == parameters == pytest.approx(26.9e9, rel=0.001)
    assert found.weights.read == 2 * (parameters - table), "14.4 GB at 4.5 bits, less the embedding's rows"
    head = 2 * width * width + full + 3 * width
    assert found.drafter_weights is not None and found.drafter_weights.nbytes == 2 * head
    assert found.layers == {"recurrent": 48, "full attention": 16}
    # A state of 48 heads of 128 x 128 in float32, three rows of 10240, both twice while a block of one row is open,
    # and what that row leaves.
    recurrence = 2 * (48 * 128 * 128 * 4 + 3 * 10240 * 2) + (10240 + 2048 + 6144 + 48) * 2 + 48 * 4
    rows = 2 * 4 * 4096 * 256 * 2
    assert at(found, 4096).cache == 48 * recurrence + 16 * rows + rows  # the last: the head's own
    read = 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2) + 16 * rows
    assert at(found, 4096).plain_read == found.weights.read + read
    assert at(found, 4096).draft_read == 2 * head + 2 * table + rows, "the head works with the target's output head"
    assert "promises" in found.drafter_reason and len(found.estimates) >= 4


def test_qwen_35b_a3b_reads_3b(tmp_path: Path) -> None:
    found = published("Qwen3.6-35B-A3B", tmp_path)
    experts = 40 * 256 * 3 * 2048 * 512
    assert found.weights.parameters == pytest.approx(34.7e9, rel=0.005)
    assert found.weights.active == found.weights.parameters - 248320 * 2048 - experts * 248 // 256
    assert (found.weights.experts, found.weights.chosen) == (256, 8)


# Parameters as the model cards give them: all, and those that are active.
CARDS = {"E2B": (None, 2.3), "E4B": (None, 4.5), "12B": (11.95, 11.95), "26B-A4B": (25.2, 3.8), "31B": (30.7, 30.7)}


@pytest.mark.parametrize("size", CARDS)
def test_every_gemma_has_about_the_parameters_of_its_card(size: str, tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "gemma4_sizes.json").read_text())[size]
    found = outline(bare(tmp_path, config), "none")
    parameters, active = CARDS[size]
    assert found.weights.active / 1e9 == pytest.approx(active, rel=0.04)
    assert parameters is None or found.weights.parameters / 1e9 == pytest.approx(parameters, rel=0.01)


# --------------------------------------------------------------------------- against loading


@pytest.mark.parametrize("variant", [*VARIANTS, *QWEN])
def test_what_is_told_is_what_loading_takes(variant: str) -> None:
    folder = str(FIXTURES / variant)
    found = outline(folder)
    # The fixtures are in bfloat16, and experts are computed in float32 only on a CPU: that doubles what is held.
    loaded = load_pair(folder, "auto", mx.float32)
    assert 2 * found.weights.nbytes == pytest.approx(loaded.pair.target.nbytes, rel=0.02)
    assert found.drafter == loaded.drafter and found.drafter_reason == loaded.drafter_reason
    assert found.drafter_weights is not None
    assert 2 * found.drafter_weights.nbytes == pytest.approx(loaded.pair.drafter.nbytes, rel=0.02)


@pytest.mark.parametrize("demo", ["demo", "demo-qwen"])
def test_a_demo_is_told_to_the_byte(demo: str) -> None:
    found, loaded = outline(demo), load_pair(demo)
    assert found.weights.nbytes == loaded.pair.target.nbytes
    assert found.drafter_weights is not None and found.drafter_weights.nbytes == loaded.pair.drafter.nbytes


@pytest.mark.parametrize("options", [{"q_bits": 4, "q_group_size": 32}, {"q_mode": "mxfp8"}], ids=str)
def test_a_quantised_folder_is_told_to_the_byte_and_so_is_its_config_alone(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "converted"
    convert(str(FIXTURES / "gemma4_unified"), str(folder), quantize=True, dtype="float32", **options)
    found, loaded = outline(str(folder), "none"), load_pair(str(folder), "none")
    assert found.weights.nbytes == loaded.pair.target.nbytes
    alone = bare(tmp_path / "alone", json.loads((folder / "config.json").read_text()) | {"dtype": "float32"})
    assert outline(alone, "none").weights == found.weights


def test_no_weight_of_a_folder_is_read(tmp_path: Path) -> None:
    """Its files may as well hold nothing behind their headers."""
    folder = Path(shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "target"))
    for file in folder.rglob("model.safetensors"):
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    shutil.rmtree(folder / "assistant_ordered")
    assert figures(str(folder)) == figures(str(FIXTURES / "gemma4_keqv"))


def figures(name: str) -> dict[str, Any]:
    """What is told, but for names and places."""
    told = outline(name).figures()
    return {key: told[key] for key in ("weights", "contexts", "layers", "estimate")} | {
        "drafter": told["drafter"]["weights"]
    }


# --------------------------------------------------------------------------- on the hub


@pytest.mark.parametrize(
    ("repo", "variant"),
    [
        ("google/gemma-4-31B-it", "gemma4_keqv"),
        ("google/gemma-4-E4B-it", "gemma4_ple"),
        ("Qwen/Qwen3.6-27B", "qwen3_5_dense"),
        ("Qwen/Qwen3.6-35B-A3B", "qwen3_5_moe_sharded"),
    ],
)
def test_a_repository_is_told_from_afar_and_not_downloaded(repo: str, variant: str, hub: Loopback) -> None:
    assert figures(repo) == figures(str(FIXTURES / variant))
    weights = [request for request in hub.log if request.file.endswith(".safetensors") and request.method == "GET"]
    assert weights and all(request.range for request in weights), "only parts of them"
    whole = sum(path.stat().st_size for path in (FIXTURES / variant).glob("*.safetensors"))
    assert sum(request.sent for request in weights) < whole / 3
    assert not [request for request in hub.log if request.file == "tokenizer.json"]
    assert not (hub.home / "hub").exists(), "nothing stays behind"


def test_a_drafter_is_found_on_the_hub_too(hub: Loopback) -> None:
    found = outline("google/gemma-4-31B-it")
    assert found.drafter == "google/gemma-4-31B-it-assistant" and found.source.startswith("the hub")
    assert found.drafter_weights is not None
    inside = outline("Qwen/Qwen3.6-27B")
    assert inside.drafter == "Qwen/Qwen3.6-27B" and inside.drafter_reason == "the mtp head inside the checkpoint"
    off = outline("google/gemma-4-31B-it", "none")
    assert off.drafter is None and off.drafter_weights is None and not off.estimates


def test_a_drafter_that_is_not_there_is_missed_aloud(hub: Loopback) -> None:
    del hub.repositories["google/gemma-4-31B-it-assistant"]
    found = outline("google/gemma-4-31B-it")
    assert found.drafter is None and "prompt lookup" in found.drafter_reason
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        outline("google/gemma-4-31B-it", "nobody/nothing")
    with pytest.raises(PairError, match="made for another target"):
        outline("google/gemma-4-31B-it", "google/gemma-4-E4B-it-assistant")


def rewritten(file: Path, change: dict[str, Any] | None) -> bytes:
    """A weight file without its last tensor, or with its first one in another shape."""
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    name = "model.language_model.norm.weight"
    norm = tensors.pop(name)
    if change is not None:
        tensors[name] = mx.zeros(change["shape"], norm.dtype)
    copy = file.parent / "rewritten.safetensors"
    mx.save_safetensors(str(copy), tensors, {"format": "pt"})
    return copy.read_bytes()


BROKEN = {
    "a tensor missing": (None, r"lacks 1 tensor \(model\.norm\.weight\)"),
    "a tensor misshapen": ({"shape": (7,)}, r"has shape \(7,\), its config means \(64,\)"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_repository_is_named_before_anything_is_downloaded(damage: str, hub: Loopback, tmp_path: Path) -> None:
    change, message = BROKEN[damage]
    folder = Path(shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "broken"))
    content = rewritten(folder / "model.safetensors", change)
    hub.add("somebody/broken", FIXTURES / "gemma4_keqv", {"model.safetensors": content})
    with pytest.raises(CheckpointError, match=f"^somebody/broken.*{message}"):
        outline("somebody/broken")
    assert hub.sent("somebody/broken", "model.safetensors") < len(content) / 3


@pytest.mark.parametrize("content", [b"", b"\xff" * 10**6, (40).to_bytes(8, "little") + b"{" * 40], ids=len)
def test_a_file_that_is_no_safetensors_is_named_and_not_read_on(content: bytes, hub: Loopback) -> None:
    hub.add("somebody/broken", FIXTURES / "gemma4_keqv", {"model.safetensors": content})
    with pytest.raises(CheckpointError, match=r"somebody.*broken") as caught:
        outline("somebody/broken")
    assert "\n" not in str(caught.value)
    assert hub.sent("somebody/broken", "model.safetensors") < 1000


def test_files_outside_the_folder_are_left_alone(hub: Loopback, tmp_path: Path) -> None:
    stray = {"../escaped.json": b"{}", "/tmp/hb-escaped.json": b"{}", "a/b/config.json": b"{}"}
    hub.add("somebody/sly", FIXTURES / "gemma4_keqv", stray)
    outline("somebody/sly", "none")
    assert not {request.file for request in hub.log} & set(stray)


def test_what_was_downloaded_before_is_told_without_a_hub(hub: Loopback) -> None:
    before = figures("google/gemma-4-31B-it")
    load_pair("google/gemma-4-31B-it")
    hub.close()
    close_session()  # it has a connection open
    found = outline("google/gemma-4-31B-it")
    assert found.source == "the hub's cache here" and figures("google/gemma-4-31B-it") == before
    with pytest.raises(CheckpointError, match="does not answer"):
        outline("google/gemma-4-E4B-it")


# --------------------------------------------------------------------------- what makes no sense


def test_what_could_not_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="is not a folder"):
        outline(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="supported targets"):
        outline(bare(tmp_path / "other", {"model_type": "qwen9"}))
    with pytest.raises(CheckpointError, match="lacks the entry 'num_key_value_heads'"):
        outline(bare(tmp_path / "half", {"model_type": "gemma4_text", "num_hidden_layers": 2}))
    for contexts in ([], [0], [100, -1]):
        with pytest.raises(RequestError, match="contexts are"):
            outline("demo", contexts=contexts)


def test_more_than_the_machine_has_does_not_fit(tmp_path: Path) -> None:
    found = outline("demo", contexts=[1000, 10**12])
    assert [entry.fits for entry in found.contexts] == [True, False]


# --------------------------------------------------------------------------- the command


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    return program("inspect", *arguments)


def test_the_command_tells_it_in_words() -> None:
    done = inspect("demo", "--context", "1000", "3000")
    assert done.returncode == 0, done.stderr
    for words in ("7.9 M", "15.8 MB", "4 window of 128", "lies in the target's folder", "fits", "Estimate",
                  "not measured", "mtp-mlx bench", "not made for 3000 tokens", "\n  1000 ", "\n  3000 "):  # fmt: skip
        assert words in done.stdout, done.stdout


def test_the_command_tells_it_in_json() -> None:
    done = inspect(str(FIXTURES / "qwen3_5_dense"), "--json", "--kv-bits", "8", "--context", "512")
    told = json.loads(done.stdout)
    assert told["kv_bits"] == 8 and [entry["tokens"] for entry in told["contexts"]] == [512]
    assert told["weights"]["bytes"] == outline(str(FIXTURES / "qwen3_5_dense")).weights.nbytes
    assert told["estimate"]["measured"] is False and told["drafter"]["name"] == str(FIXTURES / "qwen3_5_dense")


def test_the_command_downloads_no_model(hub: Loopback) -> None:
    done = inspect("google/gemma-4-31B-it", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["drafter"]["name"] == "google/gemma-4-31B-it-assistant"
    assert hub.sent("google/gemma-4-31B-it", "model.safetensors") < 100_000
    assert not list(hub.home.rglob("*.safetensors"))


def test_a_wrong_option_is_one_line() -> None:
    done = inspect("demo", "--kv-bits", "3")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "mtp-mlx: --kv-bits 3 is not one of none, 8, 4\n"
