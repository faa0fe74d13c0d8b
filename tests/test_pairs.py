"""A target finds its drafter: in its folder, by its name, by what it was made from, by its shape; each says so."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import FIXTURES
from loopback import Loopback

from mtp_mlx import loading
from mtp_mlx.checkpoint import Checkpoint
from mtp_mlx.errors import MTPError
from mtp_mlx.loading import Loaded, load, load_pair
from mtp_mlx.models.gemma4_assistant import Assistant
from mtp_mlx.ngram import NoDrafter
from mtp_mlx.pairs import choose, choose_drafter, id_of, registry

SIZES: dict[str, dict[str, Any]] = json.loads((FIXTURES / "gemma4_sizes.json").read_text())


def gemma(folder: Path = Path("/nowhere"), **config: Any) -> Checkpoint:
    """A target of no known shape, without a drafter."""
    return Checkpoint(folder, {"model_type": "gemma4", **config})


class Headless(Checkpoint):
    """A target that is released with a head, and has lost it."""

    def names(self) -> set[str]:
        return set()

    def shards(self) -> list[Path]:
        return []


def headless(bits: int | None = None, folder: Path = Path("/nowhere"), **config: Any) -> Checkpoint:
    quantization = {} if bits is None else {"quantization": {"group_size": 64, "bits": bits}}
    text = {"mtp_num_hidden_layers": 1}
    return Headless(folder, {"model_type": "qwen3_5", "text_config": text, **quantization, **config})


# What a target of this name drafts with.
ASSISTANTS = {
    "google/gemma-4-E2B-it": "google/gemma-4-E2B-it-assistant",
    "google/gemma-4-31B": "google/gemma-4-31B-it-assistant",
    "google/gemma-4-26B-A4B-it": "google/gemma-4-26B-A4B-it-assistant",
    "mlx-community/gemma-4-e2b-it-4bit": "mlx-community/gemma-4-E2B-it-assistant-bf16",
    "mlx-community/gemma-4-e4b-it-8bit": "mlx-community/gemma-4-E4B-it-assistant-bf16",
    "mlx-community/gemma-4-12B-it-nvfp4": "mlx-community/gemma-4-12B-it-assistant-bf16",
    "mlx-community/gemma-4-26b-a4b-it-mxfp8": "mlx-community/gemma-4-26B-A4B-it-assistant-bf16",
    "mlx-community/gemma-4-31b-bf16": "mlx-community/gemma-4-31B-it-assistant-bf16",
    "mlx-community/gemma-4-26B-A4B-it-OptiQ-4bit": "mlx-community/gemma-4-26B-A4B-it-assistant-bf16",
    "mlx-community/gemma-4-12B-it-qat-4bit": "mlx-community/gemma-4-12B-it-qat-assistant-4bit",
    "mlx-community/gemma-4-E4B-it-qat-8bit": "mlx-community/gemma-4-E4B-it-qat-assistant-6bit",
    "google/gemma-4-31B-it-qat-q4_0-unquantized": "google/gemma-4-31B-it-qat-q4_0-unquantized-assistant",
    "unsloth/gemma-4-E4B-it": "mlx-community/gemma-4-E4B-it-assistant-bf16",
    "unsloth/gemma-4-E2B-it-UD-MLX-4bit": "mlx-community/gemma-4-E2B-it-assistant-bf16",
    "lmstudio-community/gemma-4-31B-it-MLX-6bit": "mlx-community/gemma-4-31B-it-assistant-bf16",
}


@pytest.mark.parametrize("model", ASSISTANTS)
def test_every_form_of_a_target_has_the_assistant_of_its_size(model: str) -> None:
    choice = choose(model, gemma(), "auto")
    assert choice.drafters[0] == ASSISTANTS[model] and not choice.own
    assert choice.reason.startswith((f"published for {model}", f"{model} is a form of google/gemma-4-"))
    original = [name for name in choice.drafters if name.startswith("google/")]
    assert original, "the original always works"


HEADS = {
    ("mlx-community/Qwen3.8-27B-4bit", 4): "mlx-community/Qwen3.8-27B-MTP-4bit",
    ("mlx-community/Qwen3.8-27B-8bit", 8): "mlx-community/Qwen3.8-27B-MTP-8bit",
    ("mlx-community/Qwen3.8-27B-bf16", None): "mlx-community/Qwen3.8-27B-MTP-bf16",
    ("mlx-community/Qwen3.6-35B-A3B-4bit", 4): "mlx-community/Qwen3.6-35B-A3B-MTP-4bit",
    ("lmstudio-community/Qwen3.6-35B-A3B-MLX-8bit", 8): "mlx-community/Qwen3.6-35B-A3B-MTP-bf16",
    ("mlx-community/Qwen3.5-9B-MLX-4bit", 4): "mlx-community/Qwen3.5-9B-MTP-4bit",
    ("unsloth/Qwen3.6-27B-UD-MLX-6bit", 6): "mlx-community/Qwen3.6-27B-MTP-bf16",
}


@pytest.mark.parametrize(("model", "bits"), HEADS)
def test_a_conversion_that_lost_its_head_gets_the_split_one_in_its_precision(model: str, bits: int | None) -> None:
    assert choose_drafter(model, headless(bits), "auto")[0] == HEADS[model, bits]


def test_a_form_of_its_own_has_the_name_of_that_form() -> None:
    mxfp4 = headless(quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"})
    assert choose_drafter("mlx-community/Qwen3.8-27B-mxfp4", mxfp4, "auto")[0] == "mlx-community/Qwen3.8-27B-MTP-bf16"


def test_a_head_that_nobody_has_split_off_is_found_in_the_original() -> None:
    name, reason = choose_drafter("mlx-community/Qwen3.5-27B-4bit", headless(4), "auto")
    assert name is None
    for words in ("promises an mtp head", "prompt lookup", "mtp-mlx extract Qwen/Qwen3.5-27B`", "--drafter"):
        assert words in reason


@pytest.mark.parametrize(
    "model",
    [
        "mlx-community/gemma-4-12B-it-assistant-bf16",
        "mlx-community/gemma-4-12b-coder-fable5-composer2.5-4bit",
        "mlx-community/Qwen3.6-27B-MTP-4bit",
        "somebody/gemma-4-12B-it-4bit",
        "mlx-community/gemma-3-12b-it-4bit",
        "mlx-community/not-gemma-4-12B-it",
        "google/gemma-4-12Bit",
        "google/-it",
        "gemma-4-12B-it",
    ],
)
def test_other_names_are_nobodys(model: str) -> None:
    assert registry().family(model) is None
    name, reason = choose_drafter(model, gemma(), "auto")
    assert name is None
    assert reason == (
        f"no drafter is known for {model}: drafts are copied from earlier text only (prompt lookup); name one with "
        "--drafter"
    )


def test_the_user_has_the_last_word(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "pair")
    inside = gemma(tmp_path / "pair")
    for target in (inside, gemma()):
        named = choose("google/gemma-4-31B-it", target, "mine/own")
        assert named.drafters == ("mine/own",) and named.own
        for off in (None, "none"):
            assert choose("google/gemma-4-31B-it", target, off).drafters == ()
    found = choose("google/gemma-4-31B-it", inside, "auto")
    assert found.drafters == (str(tmp_path / "pair" / "assistant"),) and found.own


# --------------------------------------------------------------------------- folders


def test_a_folder_in_the_hubs_cache_is_what_it_was_downloaded_as(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--mlx-community--gemma-4-e4b-it-4bit" / "snapshots" / "cc3b666c"
    snapshot.mkdir(parents=True)
    assert id_of(str(snapshot)) == "mlx-community/gemma-4-e4b-it-4bit"
    card(snapshot, "base_model: google/gemma-4-31B-it")  # an id says more than a card
    name, reason = choose_drafter(str(snapshot), gemma(snapshot), "auto")
    assert name == "mlx-community/gemma-4-E4B-it-assistant-bf16" and "gemma-4-e4b-it-4bit is a form" in reason


def test_an_id_is_not_read_from_the_folder_it_was_downloaded_to(tmp_path: Path) -> None:
    """Neither the cache's folder nor what lies around it is a fine-tune of its own."""
    snapshot = tmp_path / "google" / "gemma-4-E2B-it"
    snapshot.mkdir(parents=True)
    assert choose_drafter("somebody/else", gemma(snapshot), "auto")[0] is None
    name, _ = choose_drafter("google/gemma-4-31B-it", gemma(snapshot), "auto")
    assert name == "google/gemma-4-31B-it-assistant"


def test_a_folder_named_as_an_id_counts_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lmstudio-community" / "gemma-4-31B-it-MLX-6bit"
    folder.mkdir(parents=True)
    expected = "mlx-community/gemma-4-31B-it-assistant-bf16"
    assert choose_drafter(str(folder), gemma(folder), "auto")[0] == expected
    monkeypatch.chdir(tmp_path)  # a path that looks like an id
    assert choose_drafter("lmstudio-community/gemma-4-31B-it-MLX-6bit", gemma(folder), "auto")[0] == expected
    elsewhere = tmp_path / "models" / "gemma-4-31B-it"
    elsewhere.mkdir(parents=True)
    assert choose_drafter(str(elsewhere), gemma(elsewhere), "auto")[0] is None


# --------------------------------------------------------------------------- fine-tunes


def card(folder: Path, front: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n{front}\n---\n# A model\n")


@pytest.mark.parametrize(
    "front",
    [
        "base_model: google/gemma-4-12B-it",
        "base_model:\n- google/gemma-4-12B-it",
        "base_model:\n- somebody/unknown\n- mlx-community/gemma-4-12B-it-8bit\nbase_model_relation: finetune",
    ],
)
def test_a_model_card_says_what_a_fine_tune_was_made_from(front: str, tmp_path: Path) -> None:
    card(tmp_path, front)
    choice = choose("somebody/tuned", gemma(tmp_path), "auto")
    assert choice.drafters[0].endswith("gemma-4-12B-it-assistant-bf16") or choice.drafters[0].startswith("google/")
    assert "model card says it was made from" in choice.reason and "google/gemma-4-12B-it" in choice.reason


def test_a_card_that_makes_no_sense_is_passed_over(tmp_path: Path) -> None:
    for front in ("base_model: [", "base_model: 7", "base_model: {a: b}"):
        card(tmp_path, front)
        assert choose_drafter("somebody/tuned", gemma(tmp_path), "auto")[0] is None
    (tmp_path / "README.md").write_bytes(b"---\n\xff\xfe\n---\n")
    assert choose_drafter("somebody/tuned", gemma(tmp_path), "auto")[0] is None


FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "_name_or_path in its config.json": ({"_name_or_path": "google/gemma-4-E4B-it"}, {}),
    "_name_or_path in its config.json ": ({"_name_or_path": "/models/mlx-community/gemma-4-e4b-it-4bit"}, {}),
    "base_model_name_or_path in its adapter_config.json": ({}, {"base_model_name_or_path": "unsloth/gemma-4-e4b-it"}),
    "model in its adapter_config.json": ({}, {"model": "mlx-community/gemma-4-e4b-it-4bit"}),
}


@pytest.mark.parametrize("where", FILES)
def test_other_files_say_what_a_fine_tune_was_made_from(where: str, tmp_path: Path) -> None:
    config, adapter = FILES[where]
    if adapter:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    name, reason = choose_drafter("./tuned", gemma(tmp_path, **config), "auto")
    assert name is not None and "gemma-4-E4B-it-assistant" in name and where.strip() in reason


def test_the_card_comes_before_the_config_and_both_before_the_shape(tmp_path: Path) -> None:
    text = SIZES["31B"]["text_config"]
    target = gemma(tmp_path, _name_or_path="google/gemma-4-E4B-it", text_config=text)
    assert "E4B" in str(choose_drafter("./tuned", target, "auto")[0])
    card(tmp_path, "base_model: google/gemma-4-12B-it")
    assert "12B" in str(choose_drafter("./tuned", target, "auto")[0])


@pytest.mark.parametrize("size", SIZES)
def test_a_shape_alone_tells_the_size(size: str) -> None:
    target = Checkpoint(Path("/nowhere"), SIZES[size])
    name, reason = choose_drafter("./tuned", target, "auto")
    assert name == f"mlx-community/gemma-4-{size}-it-assistant-bf16"
    assert f"shape is that of google/gemma-4-{size}-it" in reason and "hidden_size" in reason


@pytest.mark.parametrize("entry", ["hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"])
def test_a_shape_that_differs_anywhere_tells_nothing(entry: str) -> None:
    text = {**SIZES["12B"]["text_config"], entry: 7}
    assert choose_drafter("./tuned", gemma(text_config=text), "auto")[0] is None


def test_a_shape_that_models_share_tells_nothing_but_their_names() -> None:
    shape = {"hidden_size": 5120, "num_hidden_layers": 64, "vocab_size": 248320, "num_key_value_heads": 4}
    name, reason = choose_drafter("./tuned", headless(text_config={**shape, "mtp_num_hidden_layers": 1}), "auto")
    assert name is None
    assert "shape is that of Qwen/Qwen3.5-27B and Qwen/Qwen3.6-27B and Qwen/Qwen3.8-27B" in reason
    assert "prompt lookup" in reason and "mtp-mlx extract" in reason


def test_the_card_of_a_tuned_qwen_leads_to_its_base(tmp_path: Path) -> None:
    card(tmp_path, "base_model: Qwen/Qwen3.6-27B")
    assert choose_drafter("./tuned", headless(4, tmp_path), "auto")[0] == "mlx-community/Qwen3.6-27B-MTP-4bit"


# --------------------------------------------------------------------------- the data


def test_the_registry_is_sound() -> None:
    families = registry().families
    names = [name for family in families for name in family.drafters(True)]
    assert len(set(names)) == len(names) and all(name.count("/") == 1 for name in names)
    assert all(registry().family(name) is None for name in names), "no drafter is a target"
    for family in families:
        assert registry().family(family.original) is family
    for size, config in SIZES.items():
        (found,) = registry().like(config)
        assert found.name == f"gemma-4-{size}"
    assert registry().headed == loading._HEADS.keys()


# --------------------------------------------------------------------------- what cannot be had


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A fine-tune of the tiny model that the hub on this machine has as the 31B."""
    folder = Path(shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "tuned"))
    shutil.rmtree(folder / "assistant")
    card(folder, "base_model: google/gemma-4-31B-it")
    return folder


def test_the_original_is_taken_where_there_is_no_conversion(tuned: Path, hub: Loopback) -> None:
    loaded = load_pair(str(tuned))
    assert loaded.drafter == "google/gemma-4-31B-it-assistant" and isinstance(loaded.pair.drafter, Assistant)
    assert "model card" in loaded.drafter_reason


def test_the_conversion_is_taken_where_there_is_one(tuned: Path, hub: Loopback) -> None:
    hub.add("mlx-community/gemma-4-31B-it-assistant-bf16", FIXTURES / "gemma4_keqv" / "assistant")
    card(tuned, "base_model: mlx-community/gemma-4-31b-it-4bit")
    assert load_pair(str(tuned)).drafter == "mlx-community/gemma-4-31B-it-assistant-bf16"
    assert not hub.sent("google/gemma-4-31B-it-assistant")


def without(tuned: Path, *words: str) -> Loaded:
    loaded = load_pair(str(tuned))
    assert isinstance(loaded.pair.drafter, NoDrafter) and loaded.drafter is None
    for word in (*words, "model card", "prompt lookup"):
        assert word in loaded.drafter_reason
    assert "\n" not in loaded.drafter_reason
    return loaded


def test_a_drafter_that_is_not_there_is_missed_aloud(tuned: Path, hub: Loopback) -> None:
    del hub.repositories["google/gemma-4-31B-it-assistant"]
    without(tuned, "google/gemma-4-31B-it-assistant", "mlx-community/gemma-4-31B-it-assistant-bf16")


def test_a_gated_drafter_is_missed_aloud(tuned: Path, hub: Loopback) -> None:
    hub.repositories["google/gemma-4-31B-it-assistant"].gated = True
    without(tuned, "google/gemma-4-31B-it-assistant", "log in with")


def test_a_drafter_that_turns_out_not_to_fit_is_missed_aloud(tuned: Path, hub: Loopback) -> None:
    card(tuned, "base_model: google/gemma-4-E4B-it")  # which it is not
    without(tuned, "made for another target")


def test_a_hub_out_of_reach_stops_nobody(tuned: Path, hub: Loopback, caplog: pytest.LogCaptureFixture) -> None:
    hub.close()
    without(tuned, "google/gemma-4-31B-it-assistant")
    pair = load(tuned)[0].pair
    assert isinstance(pair.drafter, NoDrafter) and "prompt lookup" in caplog.text


def test_a_named_drafter_that_cannot_be_had_is_an_error(tuned: Path, hub: Loopback) -> None:
    for name in ("google/gemma-4-12B-it-assistant", "google/gemma-4-E4B-it-assistant"):  # not there; does not fit
        with pytest.raises(MTPError):
            load_pair(str(tuned), name)


def test_a_damaged_drafter_in_the_targets_folder_is_an_error(tuned: Path) -> None:
    shutil.copytree(FIXTURES / "gemma4_ple" / "assistant", tuned / "assistant")
    with pytest.raises(MTPError, match="made for another target"):
        load_pair(str(tuned))


def test_a_split_head_is_loaded_for_a_target_that_lost_its_own(tmp_path: Path, hub: Loopback) -> None:
    whole = mx.load(str(FIXTURES / "qwen3_5_dense" / "model.safetensors"))
    assert isinstance(whole, dict)
    mx.eval(list(whole.values()))
    target, head = tmp_path / "target", tmp_path / "head"
    shutil.copytree(FIXTURES / "qwen3_5_dense", target)
    save(target, {name: array for name, array in whole.items() if not name.startswith("mtp.")})
    head.mkdir()
    save(head, {name: array for name, array in whole.items() if name.startswith("mtp.")})
    config: Mapping[str, Any] = json.loads((target / "config.json").read_text())
    (head / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_5_mtp"}))
    hub.add("mlx-community/Qwen3.6-27B-MTP-bf16", head)
    card(target, "base_model: Qwen/Qwen3.6-27B")
    loaded = load_pair(str(target))
    assert loaded.drafter == "mlx-community/Qwen3.6-27B-MTP-bf16" and not isinstance(loaded.pair.drafter, NoDrafter)


def save(folder: Path, tensors: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
