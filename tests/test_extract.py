"""A head got back from an original: its bytes and no others, and it drafts as it did there."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import FIXTURES, float32_copy, mlx_lm_model
from loopback import Loopback
from mlx_lm.convert import convert
from test_loading import edit_config
from test_qwen3_5_mtp import (
    DENSE,
    SPARSE,
    Tensors,
    accepted,
    agreeable,
    drafts_as_torch,
    headless,
    load_quietly,
    parts,
    prefixed,
    read,
    save,
)
from typer.testing import CliRunner

import mtp_mlx.extract as module
from mtp_mlx.checkpoint import Header, read_header
from mtp_mlx.cli.main import app
from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.extract import Folder, extract, open_head
from mtp_mlx.hub import Remote
from mtp_mlx.models.qwen3_5_mtp import Head
from mtp_mlx.quantise import Affine

SHARDED, NEXT = "qwen3_5_moe_sharded", "qwen3_next"
ON_HUB = {"Qwen/Qwen3.6-27B": DENSE, "Qwen/Qwen3.6-35B-A3B": SHARDED}
FILE = "model-mtp.safetensors"


def same_as_original(file: Path, variant: str) -> bool:
    """Whether a file holds a fixture's head and nothing else, bit by bit."""
    found, expected = read(file), prefixed(parts(variant)[1])
    assert found.keys() == expected.keys()
    return all(mx.array_equal(array.view(mx.uint16), expected[name].view(mx.uint16)) for name, array in found.items())


def left_behind(folder: Path) -> list[str]:
    """What lies there that should not stay."""
    return [path.name for path in folder.iterdir() if "partial" in path.name or path.name.startswith(".")]


@pytest.mark.parametrize("variant", [DENSE, SPARSE, SHARDED, NEXT])
def test_a_conversion_with_the_extracted_head_drafts_as_the_original(variant: str, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    convert(str(float32_copy(variant, tmp_path / "wide")), str(folder), dtype="float32")
    done = extract(str(FIXTURES / variant), folder)
    assert same_as_original(done.file, variant) and done.found_beside and not left_behind(folder)
    assert read_header(done.file).format == "pt"
    text, rights = agreeable(variant)
    loaded = load_quietly(folder)
    assert loaded.drafter == str(done.file)
    drafts_as_torch(loaded, variant)
    assert accepted(loaded, text) == rights
    mlx_lm_model(folder)  # still loads


@pytest.mark.parametrize("repo", ON_HUB)
def test_only_the_bytes_of_the_head_are_fetched(repo: str, hub: Loopback, tmp_path: Path) -> None:
    done = extract(repo, tmp_path / FILE)
    assert same_as_original(done.file, ON_HUB[repo]) and not left_behind(tmp_path)
    _, head = open_head(repo)
    source, shards = FIXTURES / ON_HUB[repo], {piece.file for piece in head.pieces}
    hub.log.clear()
    extract(repo, tmp_path / FILE, force=True)
    weights = [r for r in hub.log if r.file.endswith(".safetensors") and r.status == 206]
    starts = [request for request in weights if request.range.startswith("bytes=0-")]
    assert {request.file for request in weights} == shards and len(starts) == len(shards)
    assert all(request.sent <= 2**16 for request in starts)
    assert sum(request.sent for request in weights) - sum(request.sent for request in starts) == head.nbytes
    small = [source / name for name in ("config.json", "model.safetensors.index.json")]
    others = hub.sent() - sum(request.sent for request in weights)
    assert others == sum(file.stat().st_size for file in small if file.is_file())
    assert done.original == sum(file.stat().st_size for file in source.glob("*.safetensors"))


def test_tensors_side_by_side_are_fetched_together(hub: Loopback, tmp_path: Path) -> None:
    repo = "Qwen/Qwen3.6-27B"
    extract(repo, tmp_path / FILE)
    ranges = set(hub.ranges(repo, "model.safetensors"))
    _, head = open_head(repo)
    assert len(head.pieces) == 15 and len(head.spans()) == 1
    assert len(ranges) == 2  # the header, the head


def test_requests_are_of_a_limited_size_and_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    _, head = open_head(str(FIXTURES / SHARDED))
    for done in (0, 1, 999, 1000, 12_345, head.nbytes - 1, head.nbytes):
        asked = list(head.spans_after(done))
        assert sum(end - begin for _, begin, end in asked) == head.nbytes - done
        assert all(0 < end - begin <= 1000 for _, begin, end in asked)
    whole = [(file, byte) for file, begin, end in head.spans() for byte in range(begin, end)]
    rest = [(file, byte) for file, begin, end in head.spans_after(5000) for byte in range(begin, end)]
    assert rest == whole[5000:]


class Stopping:
    """Lets so many requests for bytes of tensors through, then is interrupted; remembers what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int):
        self.limit, self.asked = limit, 0
        original = Remote.read

        def read(remote: Remote, file: str, begin: int, end: int) -> bytes:
            if file.endswith(".safetensors") and end - begin == 10_000:
                if self.asked == self.limit:
                    raise KeyboardInterrupt
                self.asked += 1
            return original(remote, file, begin, end)

        monkeypatch.setattr(module, "AT_ONCE", 10_000)
        monkeypatch.setattr(Remote, "read", read)


def test_an_interrupted_download_goes_on_where_it_ended(
    hub: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, file = "Qwen/Qwen3.6-35B-A3B", tmp_path / FILE
    stopping = Stopping(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        extract(repo, file)
    assert not file.exists() and (tmp_path / (FILE + ".partial")).stat().st_size > 30_000
    stopping.limit, hub_before = 10**6, len(hub.log)
    extract(repo, file)
    assert same_as_original(file, SHARDED) and not left_behind(tmp_path)
    complete = sum(end - begin == 10_000 for _, begin, end in open_head(repo)[1].spans_after(0))
    assert stopping.asked == complete and len(hub.log) > hub_before  # none of them twice


def test_a_partial_file_cut_anywhere_is_completed(hub: Loopback, tmp_path: Path) -> None:
    repo, file = "Qwen/Qwen3.6-27B", tmp_path / FILE
    whole = extract(repo, file).file.read_bytes()
    for length in (0, 5, 100, len(open_head(repo)[1].preamble), len(whole) - 1, len(whole), len(whole) + 7):
        file.unlink()
        (tmp_path / (FILE + ".partial")).write_bytes((whole + b"1234567")[:length])
        assert extract(repo, file).file.read_bytes() == whole


@pytest.mark.parametrize("change", ["another repository", "another commit"])
def test_a_partial_file_of_something_else_is_thrown_away_with_a_notice(
    change: str, hub: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repo, file = "Qwen/Qwen3.6-27B", tmp_path / FILE
    stopping = Stopping(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        extract(repo, file)
    stopping.limit = 10**6
    head = {name: array + 1 for name, array in parts(DENSE)[1].items()}
    folder = Path(shutil.copytree(FIXTURES / DENSE, tmp_path / "other"))
    save(folder / "model.safetensors", parts(DENSE)[0] | prefixed(head), "pt")
    again = "org/other" if change == "another repository" else repo
    hub.add(again, folder)
    extract(again, file)
    assert all(mx.array_equal(array, head[name[4:]]) for name, array in read(file).items())
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "another source, commit or attempt" in record.getMessage()


@pytest.mark.parametrize(("variant", "bits"), [(DENSE, 8), (DENSE, 4), (SPARSE, 8), (SHARDED, 8)])
def test_a_quantised_head_is_found_and_read_in_the_right_convention(variant: str, bits: int, tmp_path: Path) -> None:
    folder = headless(variant, tmp_path / "target")
    extract(str(FIXTURES / variant), folder, how=Affine(bits, 32))
    head = load_quietly(folder).pair.drafter
    assert isinstance(head, Head) and not left_behind(folder)
    packed = head.network.fc
    assert packed.bits == bits and packed.weight.dtype == mx.uint32
    exact = load_quietly(FIXTURES / variant).pair.drafter
    assert isinstance(exact, Head)
    for name in ("pre_fc_norm_hidden", "norm"):
        assert mx.array_equal(head.network[name].weight, exact.network[name].weight)
    if variant != DENSE:
        assert head.network.layers[0].mlp.gate.weight.dtype == mx.float32
    mine = mx.dequantize(packed.weight, packed.scales, packed.biases, group_size=32, bits=bits)
    assert mx.abs(mine - exact.network.fc.weight).max() < 0.1 * mx.abs(exact.network.fc.weight).max() + 1e-6
    assert exact.nbytes > head.nbytes


def test_an_eight_bit_head_drafts_nearly_as_the_original(tmp_path: Path) -> None:
    folder = headless(DENSE, tmp_path / "target")
    extract(str(FIXTURES / DENSE), folder, how=Affine(8, 32))
    text, rights = agreeable(DENSE)
    assert sum(accepted(load_quietly(folder), text)) > 0.7 * sum(rights)


def test_a_head_under_a_wrappers_prefix_and_one_beside_the_index_are_found(tmp_path: Path) -> None:
    wrapped = headless(DENSE, tmp_path / "wrapped")
    save(wrapped / "mtp.safetensors", prefixed(parts(DENSE)[1], "language_model.mtp."), "pt")
    extract(str(wrapped), tmp_path / FILE)
    assert same_as_original(tmp_path / FILE, DENSE)
    extract(str(wrapped / "mtp.safetensors"), tmp_path / "again.safetensors")
    assert same_as_original(tmp_path / "again.safetensors", DENSE)


@pytest.mark.parametrize(("written", "read_as"), [("pt", "pt"), (None, "pt"), ("mlx", "pt")])
def test_the_format_is_written_down_even_if_the_original_leaves_it_out(
    written: str | None, read_as: str, tmp_path: Path
) -> None:
    """The convolutions that tell of it stay behind; they may lie in another shard than the head."""
    folder = headless(DENSE, tmp_path / "original")
    trunk, head = parts(DENSE)
    save(folder / "model.safetensors", trunk, written)
    save(folder / "model-2.safetensors", prefixed(head), written)
    places = dict.fromkeys(trunk, "model.safetensors") | dict.fromkeys(prefixed(head), "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert read_header(extract(str(folder), tmp_path / FILE).file).format == read_as


def test_a_head_stored_as_applied_is_not_called_raw(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    convert(str(FIXTURES / DENSE), str(folder))
    save(
        folder / "mtp.safetensors",
        prefixed({n: a + 1 if a.ndim == 1 else a for n, a in parts(DENSE)[1].items()}),
        "mlx",
    )
    target = headless(DENSE, tmp_path / "target")
    assert read_header(extract(str(folder), target).file).format == "mlx"
    drafts_as_torch(load_quietly(target), DENSE)


def _without_head(folder: Path) -> object:
    return save(folder / "model.safetensors", parts(DENSE)[0], "pt")


def _set(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, lambda config: config.update(changes))


def _replace(change: Callable[[Tensors], Tensors]) -> Callable[[Path], object]:
    trunk, head = parts(DENSE)
    return lambda folder: save(folder / "model.safetensors", trunk | prefixed(change(dict(head))), "pt")


def _packed_without_biases(head: Tensors) -> Tensors:
    weight, scales, *_ = mx.quantize(head["fc.weight"], group_size=32, bits=4, mode="mxfp4")
    return head | {"fc.weight": weight, "fc.scales": scales}


def _index(content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(content))


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (_without_head, r"holds no tensors mtp\.\*; give the original"),
    "another family": (
        _set(model_type="gemma4"),
        "'gemma4', which has no mtp head inside; its drafter is a checkpoint",
    ),
    "unknown family": (_set(model_type="llama"), "'llama', which has no mtp head inside; models with one: qwen3_5"),
    "a head already": (_set(model_type="qwen3_5_mtp"), "is an mtp head already"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "scales of blocks": (_replace(lambda h: h | {"fc.weight_scale_inv": mx.zeros((1, 1))}), "block-scaled FP8"),
    "packed otherwise": (_replace(_packed_without_biases), "quantised .* that its tensors do not tell"),
    "no weight map": (_index({}), "has no weight_map"),
    "shard elsewhere": (
        _index({"weight_map": {"mtp.fc.weight": "../model.safetensors"}}),
        "lacks ../model.safetensors",
    ),
}


@pytest.mark.parametrize("fault", UNFIT)
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "hub"])
def test_a_source_without_a_usable_head_is_refused(fault: str, remote: bool, tmp_path: Path, hub: Loopback) -> None:
    apply, message = UNFIT[fault]
    folder = Path(shutil.copytree(FIXTURES / DENSE, tmp_path / "original"))
    apply(folder)
    hub.add("org/original", folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        extract("org/original" if remote else str(folder), tmp_path / FILE)
    assert "\n" not in str(caught.value) and not (tmp_path / FILE).exists() and not left_behind(tmp_path)


def test_fp8_of_the_format_itself_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = Folder.header

    def header(folder: Folder, file: str) -> Header:
        found = original(folder, file)
        changed = {name: entry._replace(dtype="F8_E4M3") for name, entry in found.tensors.items() if "fc." in name}
        return Header({**found.tensors, **changed}, found.format)

    monkeypatch.setattr(Folder, "header", header)
    with pytest.raises(CheckpointError, match=r"block-scaled FP8 .mtp.fc.weight.* original in bfloat16"):
        extract(str(FIXTURES / DENSE), tmp_path / FILE)


def test_an_output_in_the_way_is_kept_unless_forced(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text("mine")
    with pytest.raises(RequestError, match=f"{FILE} is there already; .*--force"):
        extract(str(FIXTURES / DENSE), tmp_path)
    assert file.read_text() == "mine"
    extract(str(FIXTURES / DENSE), tmp_path, force=True)
    assert same_as_original(file, DENSE)
    for output in (tmp_path / "nowhere", tmp_path / "head.bin"):
        with pytest.raises(RequestError, match="neither a folder that exists nor a file"):
            extract(str(FIXTURES / DENSE), output)


def test_a_failure_keeps_the_file_that_was_to_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / FILE
    file.write_text("mine")
    monkeypatch.setattr(Folder, "read", lambda *_: b"too short")
    with pytest.raises(CheckpointError, match=r"gave 9 bytes of \d+"):
        extract(str(FIXTURES / DENSE), file, force=True)
    assert file.read_text() == "mine"


def test_a_target_that_has_no_use_for_the_head_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Folder, "read", lambda *_: pytest.fail("read"))
    wide = headless(DENSE, tmp_path / "wide")
    edit_config(wide, lambda config: config["text_config"].update(hidden_size=96))
    gemma = Path(shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "gemma"))
    full = Path(shutil.copytree(FIXTURES / DENSE, tmp_path / "full"))
    for folder, message in (
        (wide, "belongs to another target: hidden_size 64, .* has 96"),
        (headless(SPARSE, tmp_path / "experts"), "num_experts None, .* has 4"),
        (gemma, "'gemma4', which takes no mtp head"),
        (full, "holds an mtp head already"),
    ):
        with pytest.raises(CheckpointError, match=message):
            extract(str(FIXTURES / DENSE), folder)


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(CheckpointError, match=r"has 0.00 GB free, the head needs 0.00 GB; make room"):
        extract(str(FIXTURES / DENSE), tmp_path / FILE)
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        extract(str(FIXTURES / DENSE), tmp_path / FILE)


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path: Path, hub: Loopback) -> None:
    folder = headless(DENSE, tmp_path / "target")
    result = CliRunner().invoke(
        app, ["extract", "Qwen/Qwen3.6-27B", "-o", str(folder), "--bits", "8", "--group-size", "32"]
    )
    assert result.exit_code == 0, result.output
    assert f"{folder / FILE}: 15 tensors" in result.stdout and f"generate --model {folder}" in result.stdout
    for options, message in (
        (["--bits", "2"], "2 is not one of 4, 8, none"),
        (["--bits", "4", "--group-size", "48"], "48"),
    ):
        refused = CliRunner().invoke(app, ["extract", str(FIXTURES / DENSE), "-o", str(tmp_path / FILE), *options])
        assert refused.exit_code == 1 and message in str(refused.exception)
    alone = CliRunner().invoke(app, ["extract", str(FIXTURES / DENSE), "-o", str(tmp_path / FILE)])
    assert f"--drafter {tmp_path / FILE}" in alone.stdout
