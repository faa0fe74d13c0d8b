"""A conversion is the original: to the last bit where nothing is quantised, and as a pair where something is."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from conftest import (
    FIXTURES,
    QWEN,
    VARIANTS,
    Forced,
    gap,
    mlx_lm_model,
    plain,
    run_rounds,
    varied_tokens,
)
from loopback import Loopback
from mlx_lm.convert import convert as convert_by_mlx_lm
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_config
from test_loading import edit_config
from test_qwen3_5_mtp import (
    DENSE,
    SPARSE,
    accepted,
    agreeable,
    drafts_as_torch,
    headless,
    load_quietly,
    parts,
    save,
    split_folder,
)
from typer.testing import CliRunner

import mtp_mlx.convert as module
from mtp_mlx.checkpoint import Checkpoint, Header, read_header
from mtp_mlx.cli.convert import parse_bits
from mtp_mlx.cli.main import app
from mtp_mlx.convert import Precision, convert
from mtp_mlx.draft_model import DraftModel
from mtp_mlx.errors import CheckpointError, MTPError, PairError, RequestError
from mtp_mlx.generate import generate
from mtp_mlx.loading import Loaded, load_pair
from mtp_mlx.ngram import NOBODY, NoDrafter
from mtp_mlx.sampling import Greedy

EXACT = Precision.choose("none", None, "affine", None, mx.float32)
GEMMA = "gemma4_keqv"
TEXT = varied_tokens(24)


def asked(**given: Any) -> Precision:
    """Settings as a user gives them, in float32."""
    usual = {"bits": None, "group_size": None, "mode": "affine", "recipe": None, "dtype": mx.float32}
    return Precision.choose(**(usual | given))


def rows_of(loaded: Loaded, k: int) -> mx.array:
    """Log-probabilities along a varied text, k tokens drafted in each round."""
    drafter = loaded.pair.drafter if k else NOBODY
    return run_rounds(loaded.pair.target, drafter, Forced(mx.array(TEXT + [0] * 8)), TEXT[:9], 14, k)[1]


@cache
def original_rows(variant: str) -> mx.array:
    return rows_of(load_pair(str(FIXTURES / variant), "auto", mx.float32), 3)


def as_mlx_lm_sees_it(folder: Path) -> mx.array:
    logits: mx.array = mlx_lm_model(folder)(mx.array(TEXT)[None])[0, 8:-2]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("variant", [*QWEN, *VARIANTS])
def test_an_unquantised_conversion_gives_the_originals_logits_and_drafts(variant: str, tmp_path: Path) -> None:
    done = convert(str(FIXTURES / variant), tmp_path / "out", EXACT)
    found = load_pair(str(done.folder), "auto", mx.float32)
    assert str(done.folder) in str(found.drafter)
    rows = rows_of(found, 3)
    assert gap(rows, original_rows(variant)) == 0
    assert gap(rows, as_mlx_lm_sees_it(done.folder)) < 2e-4
    assert 32 <= done.bits_per_weight < 32.1
    if variant in QWEN:
        text, rights = agreeable(variant)
        drafts_as_torch(found, variant)
        assert accepted(found, text) == rights
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out"}


QUANTISED: list[tuple[str, dict[str, Any], str]] = [
    (DENSE, {"bits": 4, "group_size": 32}, "auto"),
    (SPARSE, {"bits": 8, "group_size": 32}, "auto"),
    ("qwen3_5_moe_sharded", {"recipe": "mixed_3_6", "group_size": 32}, "4"),
    ("qwen3_5_tied", {"recipe": "mixed_4_6", "group_size": 32}, "none"),
    ("qwen3_next", {"bits": 4, "group_size": 32}, "8"),
    (SPARSE, {"mode": "nvfp4"}, "auto"),
    ("gemma4_ple", {"bits": 8, "group_size": 32}, "auto"),
    ("gemma4_moe", {"recipe": "mixed_3_4", "group_size": 32}, "auto"),
    ("gemma4_unified", {"mode": "mxfp4"}, "8"),
    (GEMMA, {"bits": 4, "group_size": 32}, "none"),
]


@pytest.mark.parametrize(("variant", "settings", "drafter_bits"), QUANTISED, ids=str)
def test_a_quantised_conversion_drafts_losslessly_and_is_what_mlx_lm_loads(
    variant: str, settings: dict[str, Any], drafter_bits: str, tmp_path: Path
) -> None:
    done = convert(str(FIXTURES / variant), tmp_path / "out", asked(**settings), drafter_bits=drafter_bits)
    loaded = load_pair(str(done.folder), "auto", mx.float32)
    target, drafter = loaded.pair.target, loaded.pair.drafter
    assert done.bits_per_weight < 16 and done.target < done.before and not isinstance(drafter, NoDrafter)
    rows = rows_of(loaded, 0)
    assert gap(rows, as_mlx_lm_sees_it(done.folder)) < 1e-3
    assert gap(rows_of(loaded, 3), rows) < 2e-4
    prompt = varied_tokens(30, seed=3)
    assert run_rounds(target, drafter, Greedy(), prompt, 12, 3)[0] == plain(target, prompt, 12)
    files = [done.folder / "model-mtp.safetensors", done.folder / "mtp.safetensors"]
    files += [done.folder / "assistant" / "model.safetensors"]
    (file,) = [file for file in files if file.is_file()]
    packed = any(name.endswith(".scales") for name in read_header(file).names)
    assert packed == (drafter_bits != "none") and done.drafter == file.stat().st_size


@pytest.mark.parametrize("variant", [DENSE, "gemma4_ple"])
def test_mlx_lm_writes_the_same_text_from_the_conversion(variant: str, tmp_path: Path) -> None:
    done = convert(str(FIXTURES / variant), tmp_path / "out", asked(bits=8, group_size=32))
    loaded = load_pair(str(done.folder), "auto", mx.float32)
    model, tokenizer = mlx_lm.load(str(done.folder))[:2]
    theirs = mlx_lm.generate(model, tokenizer, TEXT[:20], max_tokens=20)
    assert generate(loaded.pair, loaded.tokenizer, TEXT[:20], max_tokens=20, depth=3) == theirs


@pytest.mark.parametrize("variant", [SPARSE, "gemma4_moe"])
def test_experts_are_quantised_and_what_chooses_them_keeps_eight_bits(variant: str, tmp_path: Path) -> None:
    done = convert(str(FIXTURES / variant), tmp_path / "out", asked(recipe="mixed_3_6", group_size=32))
    target = load_pair(str(done.folder), None).pair.target
    modules = dict(target.named_modules())  # type: ignore[attr-defined]
    stacks = [found for found in modules.values() if isinstance(found, QuantizedSwitchLinear)]
    assert stacks and {stack.bits for stack in stacks} <= {3, 6}
    routers = [found for name, found in modules.items() if name.endswith(("mlp.gate", "router.proj"))]
    assert routers and all(router.bits == 8 for router in routers)


@pytest.mark.parametrize("bits", [2, 8])
def test_more_bits_weigh_more(bits: int, tmp_path: Path) -> None:
    done = convert(str(FIXTURES / DENSE), tmp_path / "out", asked(bits=bits, group_size=64), drafter="none")
    assert bits + 0.5 <= done.bits_per_weight < bits + 5  # the convolutions of a tiny model are not small
    assert load_config(done.folder)["quantization"]["bits"] == bits


@pytest.mark.parametrize(("bits", "expected"), [(4, 4), (8, 8), (3, 4)])
def test_a_drafters_bits_go_with_the_targets_but_never_below_four(bits: int, expected: int) -> None:
    drafter = asked(bits=bits).of_drafter("auto")
    assert drafter is not None and drafter.bits == expected
    assert EXACT.of_drafter("auto") is None and asked(bits=bits).of_drafter("none") is None
    mixed = asked(recipe="mixed_2_6").of_drafter("auto")
    assert mixed is not None and mixed.bits == 4


def test_bfloat16_stays_what_it_is_and_half_precision_is_chosen(tmp_path: Path) -> None:
    kept = convert(str(FIXTURES / DENSE), tmp_path / "kept", asked(bits="none", dtype=None))
    half = convert(str(FIXTURES / DENSE), tmp_path / "half", asked(bits="none", dtype=mx.float16))
    names = {name: entry.dtype for name, entry in read_header(kept.folder / "model.safetensors").tensors.items()}
    assert {dtype for name, dtype in names.items() if not name.endswith("A_log")} == {"BF16"}
    header = read_header(half.folder / "model.safetensors").tensors
    assert {entry.dtype for name, entry in header.items() if not name.endswith("A_log")} == {"F16"}
    assert {e.dtype for n, e in header.items() if n.endswith("A_log")} == {
        dtype for name, dtype in names.items() if name.endswith("A_log")
    }
    assert isinstance(load_pair(str(half.folder)).drafter, str)


# --------------------------------------------------------------------------- drafters


def test_without_a_head_the_target_is_converted_and_that_is_said(tmp_path: Path) -> None:
    done = convert(str(headless(DENSE, tmp_path / "original")), tmp_path / "out", asked(bits=4, group_size=32))
    assert done.drafter is None and "prompt lookup" in done.drafter_reason
    loaded = load_quietly(done.folder)
    assert isinstance(loaded.pair.drafter, NoDrafter)
    assert run_rounds(loaded.pair.target, NOBODY, Greedy(), TEXT, 10, 0)[0] == plain(loaded.pair.target, TEXT, 10)
    turned_off = convert(str(FIXTURES / GEMMA), tmp_path / "alone", asked(bits=4, group_size=32), drafter="none")
    assert turned_off.drafter is None and not (turned_off.folder / "assistant").exists()


def test_a_head_from_elsewhere_is_taken(tmp_path: Path) -> None:
    target = headless(DENSE, tmp_path / "original")
    done = convert(str(target), tmp_path / "out", EXACT, drafter=str(FIXTURES / DENSE))
    drafts_as_torch(load_quietly(done.folder), DENSE)
    assert done.drafter_reason == "named by the caller"


def test_of_an_original_on_the_hub_that_is_only_the_drafter_no_more_than_the_head_is_read(
    hub: Loopback, tmp_path: Path
) -> None:
    target = headless(DENSE, tmp_path / "original")
    done = convert(str(target), tmp_path / "out", EXACT, drafter="Qwen/Qwen3.6-27B")
    drafts_as_torch(load_quietly(done.folder), DENSE)
    assert not (hub.home / "hub").exists() and done.drafter is not None
    starts = 2**16 * sum("bytes=0-" in given for given in hub.ranges("Qwen/Qwen3.6-27B", "model.safetensors"))
    assert hub.sent(file="model.safetensors") <= done.drafter + starts


@pytest.mark.parametrize("bits", ["none", "8"])
def test_a_head_that_is_a_folder_of_its_own_stays_one(bits: str, tmp_path: Path) -> None:
    target = headless(DENSE, tmp_path / "original")
    drafter = split_folder(tmp_path / "head", DENSE, parts(DENSE)[1])
    done = convert(str(target), tmp_path / "out", asked(bits="none"), drafter=str(drafter), drafter_bits=bits)
    loaded = load_quietly(done.folder)
    text, rights = agreeable(DENSE)
    assert loaded.drafter == str(done.folder / "assistant") and done.drafter
    if bits == "none":
        drafts_as_torch(loaded, DENSE)
    assert sum(accepted(loaded, text)) > 0.7 * sum(rights)


def test_both_parts_come_from_the_hub(hub: Loopback, tmp_path: Path) -> None:
    done = convert("google/gemma-4-31B-it", tmp_path / "gemma", EXACT)
    found = load_pair(str(done.folder), "auto", mx.float32)
    assert gap(rows_of(found, 3), original_rows(GEMMA)) == 0
    assert not [path for path in done.folder.rglob("*") if path.is_symlink()]
    done = convert("Qwen/Qwen3.6-35B-A3B", tmp_path / "qwen", EXACT)
    drafts_as_torch(load_quietly(done.folder), "qwen3_5_moe_sharded")


def test_a_smaller_model_that_drafts_comes_along_with_its_tokens(tmp_path: Path) -> None:
    smaller = str(FIXTURES / "gemma4_keqv")
    precision = Precision.choose(8, 32, "affine", None, mx.float32)
    convert(str(FIXTURES / "gemma4_ple"), tmp_path / "out", precision, drafter=smaller)
    loaded = load_pair(str(tmp_path / "out"))
    assert isinstance(loaded.pair.drafter, DraftModel) and loaded.drafter == str(tmp_path / "out" / "assistant")
    texts = {generate(loaded.pair, loaded.tokenizer, "import os", max_tokens=10, depth=depth) for depth in (0, 3)}
    assert len(texts) == 1


def test_the_folder_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", "../here"):
        with pytest.raises(RequestError, match="is the folder that you are in"):
            convert(
                str(FIXTURES / "gemma4_ple"), Path(output), Precision.choose(4, 32, "affine", None, None), force=True
            )


def test_an_assistant_that_is_quantised_already_is_taken_as_it_is(tmp_path: Path) -> None:
    first = convert(str(FIXTURES / GEMMA), tmp_path / "first", asked(bits=8, group_size=32))
    again = convert(
        str(FIXTURES / GEMMA), tmp_path / "out", asked(bits=4, group_size=32), drafter=str(first.folder / "assistant")
    )
    config = load_config(again.folder / "assistant")
    assert config["quantization"]["bits"] == 8
    originals, copies = (mx.load(str(done.folder / "assistant" / "model.safetensors")) for done in (first, again))
    assert isinstance(originals, dict) and isinstance(copies, dict) and originals.keys() == copies.keys()
    assert all(mx.array_equal(array, copies[name]) for name, array in originals.items())


@pytest.mark.parametrize(
    ("source", "drafter", "error", "message"),
    [
        (GEMMA, "gemma4_ple/assistant", PairError, "made for another target"),
        (GEMMA, DENSE, PairError, "does not draft for"),
        (DENSE, SPARSE, CheckpointError, "num_experts 4, .* has None"),
        (DENSE, GEMMA, PairError, "does not draft for"),
    ],
)
def test_a_drafter_of_another_target_is_refused_before_anything_is_converted(
    source: str, drafter: str, error: type[MTPError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        convert(str(FIXTURES / source), tmp_path / "out", EXACT, drafter=str(FIXTURES / drafter))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- what mlx-lm assumes otherwise


@pytest.mark.parametrize("variant", ["gemma4_unified", "gemma4_ple"])
def test_entries_that_a_config_leaves_out_are_written_for_mlx_lm(variant: str, tmp_path: Path) -> None:
    """It assumes the largest vocabulary, and per-layer embeddings in models that never have them."""
    folder = Path(shutil.copytree(FIXTURES / variant, tmp_path / "original"))
    edit_config(folder, lambda config: config.pop("vocab_size"))
    if variant == "gemma4_unified":
        edit_config(folder, lambda config: config["text_config"].pop("hidden_size_per_layer_input"))
    with pytest.raises(ValueError):
        mlx_lm_model(folder)
    done = convert(str(folder), tmp_path / "out", EXACT)
    assert gap(as_mlx_lm_sees_it(done.folder), original_rows(variant)) < 2e-4


# --------------------------------------------------------------------------- what is refused


def _quantised_by_mlx_lm(folder: Path) -> None:
    convert_by_mlx_lm(str(FIXTURES / DENSE), str(folder), quantize=True, q_group_size=32)


def _declared(entry: dict[str, Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shutil.copytree(FIXTURES / DENSE, folder)
        edit_config(folder, lambda config: config.update(entry))

    return apply


def _packed(folder: Path) -> None:
    shutil.copytree(headless(DENSE, folder.parent / "x"), folder)
    save(folder / "model.safetensors", {"a.weight": mx.zeros((4, 4), mx.uint32)})


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "quantised by mlx-lm": (_quantised_by_mlx_lm, r"is quantised already \(affine\); convert the original"),
    "fp8": (_declared({"quantization_config": {"quant_method": "fp8"}}), r"is quantised already \(fp8\)"),
    "packed without a word": (_packed, "tensors of type U32, so it is quantised already"),
    "unknown": (_declared({"model_type": "qwen9"}), "'qwen9'; supported targets"),
    "an assistant": (lambda folder: shutil.copytree(FIXTURES / GEMMA / "assistant", folder), "is a drafter"),
    "nothing": (lambda folder: folder.mkdir(), "has no config.json"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_no_original_is_refused(source: str, tmp_path: Path) -> None:
    apply, message = SOURCES[source]
    apply(tmp_path / "original")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(str(tmp_path / "original"), tmp_path / "out", EXACT)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"bits": 7}, "7 bits are not possible; give one of 2, 3, 4, 5, 6, 8"),
    ({"group_size": 48}, "group size of 48 is not possible; give one of 32, 64, 128"),
    ({"mode": "int4"}, "--mode int4 is not one of affine, mxfp4, mxfp8, nvfp4"),
    ({"mode": "mxfp4", "bits": 8}, "mxfp4 means 4 bits in groups of 32"),
    ({"mode": "nvfp4", "group_size": 64}, "nvfp4 means 4 bits in groups of 16"),
    ({"recipe": "mixed_1_2"}, "--recipe mixed_1_2 is not one of mixed_2_6"),
    ({"recipe": "mixed_3_6", "bits": 4}, "says how many bits"),
    ({"recipe": "mixed_3_6", "mode": "mxfp4"}, "says how many bits"),
    ({"recipe": "mixed_3_6", "group_size": 16}, "group size of 16"),
    ({"bits": "none", "mode": "mxfp4"}, "quantises nothing"),
    ({"bits": "none", "group_size": 32}, "quantises nothing"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=str)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        asked(**settings)


def test_a_drafters_bits_that_do_not_pay_are_refused() -> None:
    with pytest.raises(RequestError, match="--drafter-bits 2 is not one of auto, 4, 8, none"):
        EXACT.of_drafter("2")
    with pytest.raises(RequestError, match="--bits many is neither a number nor 'none'"):
        parse_bits("many")


def test_an_output_in_the_way_is_refused_and_only_a_model_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    source = str(FIXTURES / DENSE)
    with pytest.raises(RequestError, match="is there already; give another OUTPUT, or --force"):
        convert(source, output, EXACT)
    with pytest.raises(RequestError, match="is no model folder, so --force does not replace it"):
        convert(source, output, EXACT, force=True)
    assert (output / "thesis.txt").read_text() == "mine"
    (output / "config.json").write_text("{}")
    convert(source, output, EXACT, force=True)
    assert load_quietly(output).drafter and not (output / "thesis.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_the_users_own_is_not_worked_in(tmp_path: Path) -> None:
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"out\.partial is there already, .* move it away"):
        convert(str(FIXTURES / DENSE), tmp_path / "out", EXACT)
    assert (mine / "thesis.txt").read_text() == "mine"


def test_bits_that_do_not_pay_are_refused_before_anything_is_downloaded(hub: Loopback, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--drafter-bits 2"):
        convert("google/gemma-4-31B-it", tmp_path / "out", EXACT, drafter_bits="2")
    assert not hub.log


def test_the_original_is_never_replaced(tmp_path: Path) -> None:
    source = Path(shutil.copytree(FIXTURES / GEMMA, tmp_path / "pair"))
    with pytest.raises(RequestError, match="holds the original"):
        convert(str(source), source, EXACT, force=True)
    inner = Path(shutil.copytree(FIXTURES / DENSE, source / "inner"))
    with pytest.raises(RequestError, match="holds the original"):
        convert(str(inner), source, EXACT, force=True)


# --------------------------------------------------------------------------- interruptions


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interruption_leaves_no_output_and_a_second_attempt_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "save_config", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(FIXTURES / DENSE), tmp_path / "out", EXACT)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.undo()
    done = convert(str(FIXTURES / DENSE), tmp_path / "out", EXACT)
    assert "starting anew" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["out"]
    drafts_as_torch(load_quietly(done.folder), DENSE)


@pytest.mark.parametrize("variant", [DENSE, GEMMA])
def test_a_finished_target_is_not_converted_twice(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_write_drafter", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(FIXTURES / variant), tmp_path / "out", EXACT)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_write_target", lambda *_: pytest.fail("converted twice"))
    done = convert(str(FIXTURES / variant), tmp_path / "out", EXACT)
    assert "going on from there" in caplog.text
    assert gap(rows_of(load_pair(str(done.folder), "auto", mx.float32), 3), original_rows(variant)) == 0
    assert not (done.folder / "convert.json").exists()


@pytest.mark.parametrize("change", ["precision", "source", "drafter"])
def test_a_target_finished_for_something_else_is_not_taken(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(FIXTURES / DENSE, tmp_path / "original"))
    monkeypatch.setattr(module, "_write_drafter", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "out", EXACT)
    monkeypatch.undo()
    written: list[Path] = []
    original = module._write_target

    def watched(task: module._Task, work: Path) -> None:
        written.append(work)
        original(task, work)

    monkeypatch.setattr(module, "_write_target", watched)
    if change == "source":
        shutil.copy(FIXTURES / DENSE / "model.safetensors", source)  # at another time
    precision = asked(bits=8, group_size=32) if change == "precision" else EXACT
    convert(str(source), tmp_path / "out", precision, drafter="none" if change == "drafter" else "auto")
    assert len(written) == 1


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(CheckpointError, match=r"has 0.0 GB free, .* make room"):
        convert(str(FIXTURES / DENSE), tmp_path / "out", EXACT)
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[write] Unable to write 4096 bytes to file.")

    monkeypatch.setattr(module, "save_model", full)
    with pytest.raises(CheckpointError, match=r"out cannot be written: \[write\] .*out.partial"):
        convert(str(FIXTURES / DENSE), tmp_path / "out", EXACT)
    assert not (tmp_path / "out").exists()


def test_float8_without_a_word_in_the_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def header(path: Path) -> Header:
        found = read_header(path)
        return Header({name: e._replace(dtype="F8_E4M3") for name, e in found.tensors.items()}, found.format)

    monkeypatch.setattr(module, "read_header", header)
    with pytest.raises(CheckpointError, match="tensors of type F8_E4M3"):
        convert(str(FIXTURES / DENSE), tmp_path / "out", EXACT)


def test_what_a_tokenizer_needs_comes_along_and_nothing_else(tmp_path: Path) -> None:
    done = convert(str(FIXTURES / GEMMA), tmp_path / "out", EXACT)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (done.folder / name).read_bytes() == (FIXTURES / GEMMA / name).read_bytes()
    assert not (done.folder / "golden.npz").exists()
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization" not in config and Checkpoint.open(done.folder).model_type == "gemma4"


def test_the_command_reports_sizes_bits_and_the_drafter(tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["convert", str(FIXTURES / DENSE), str(output), "--bits", "4", "--group-size", "32"]
    )
    assert result.exit_code == 0, result.output
    for words in (
        f"{output}: target 0.3 MB, 5.18",
        "bits per weight",
        "weights are 1.1 MB",
        "drafter: 0.0 MB",
        "mtp head",
    ):
        assert words in result.stdout
    assert "[INFO]" not in result.output and f"generate --model {output}" in result.stdout
    text = CliRunner().invoke(app, ["generate", "a b", "--model", str(output), "-m", "4", "--json"])
    assert text.exit_code == 0 and json.loads(text.stdout)["drafter"].endswith("model-mtp.safetensors")
