"""Qwen's mtp head against torch, through every way its cache can be filled; every form its file comes in."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    FIXTURES,
    QWEN,
    VOCAB,
    Forced,
    Recorder,
    certain,
    float32_copy,
    golden,
    open_sequence,
    rows_of,
    run_rounds,
    tiny_qwen,
    varied_tokens,
)
from mlx_lm.convert import convert
from test_gemma4 import close
from test_loading import edit_config

from mtp_mlx.cache import MAX_BLOCK, Cache, FullCache
from mtp_mlx.choosing import Rules
from mtp_mlx.errors import CheckpointError, PairError
from mtp_mlx.loading import Loaded, _declared_convention, load, load_pair
from mtp_mlx.models import qwen3_5_mtp
from mtp_mlx.models.qwen3_5 import Model
from mtp_mlx.models.qwen3_5_mtp import Convention, Head, Network, convention, exceptions, own_tensors, sanitize
from mtp_mlx.ngram import NoDrafter
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Pick, Span, State

Tensors = dict[str, mx.array]

DENSE, SPARSE = "qwen3_5_dense", "qwen3_5_moe"
STEPS = 4  # drafts of a golden round

# --------------------------------------------------------------------------- drafts and the head's cache


def primed(target: Model, head: Head, tokens: list[int], step: int = 512) -> Sequence:
    """A sequence that has read a text up to its last token, `step` tokens at a time."""
    sequence = open_sequence(target, head, Forced(mx.array(tokens)))
    sequence.prefill(tokens, step, lambda done, total: None)
    return sequence


class Watched:
    """A head's network whose hiddens are remembered."""

    def __init__(self, network: Network):
        self.network, self.remember = network, network.remember
        self.hidden: list[mx.array] = []  # (1, 1, D) each

    def __call__(self, *inputs: Any) -> mx.array:
        self.hidden.append(self.network(*inputs))
        return self.hidden[-1]


def chain(sequence: Sequence, head: Head | None = None) -> Recorder:
    """The draft steps that would come next, once the newest round is committed."""
    sequence.commit()
    pick, drafter = Recorder(), head or sequence.pair.drafter
    assert isinstance(drafter, Head)
    drafter.draft(sequence.state, sequence.cache, mx.array(sequence.text[-1:]), STEPS, pick)
    return pick


def logits_of(pick: Recorder) -> mx.array:
    """(steps, V)"""
    return mx.concatenate([logits[0] for logits in pick.logits])


def pairs_of(sequence: Sequence, count: int) -> tuple[mx.array, mx.array]:
    """Keys and values of the first `count` pairs, (H, count, head size)."""
    layer = sequence.cache.layers[-1]
    assert isinstance(layer, FullCache)
    keys, values = rows_of(layer.stored())
    return keys[0, :, :count], values[0, :, :count]


def told(head: Head, tokens: list[int], hidden: np.ndarray) -> tuple[State, Cache]:
    """The head's state after it was told of tokens with these hiddens, (T, D), and the cache; no target runs."""
    memory = head.target.make_cache()
    state = head.start(memory)
    count = len(tokens)
    memory.position = memory.position + count
    rows = mx.array(hidden)[None]
    return head.advance(state, memory, mx.array([tokens]), Span(0, count), rows, mx.array([count - 1])), memory


def golden_rounds(variant: str) -> Iterator[tuple[int, int, list[int]]]:
    """Number of each golden draft round, the place of its bonus token, and the text."""
    for i, bonus in enumerate(golden(variant)["draft_bonus"].tolist()):
        yield i, bonus, golden(variant)["tokens"].tolist()


@pytest.mark.parametrize("variant", QWEN)
def test_drafts_equal_torch(variant: str) -> None:
    target, head = tiny_qwen(variant)
    expected = golden(variant)
    for i, bonus, text in golden_rounds(variant):
        sequence = primed(target, head, text[: bonus + 1])
        watched = Watched(head.network)
        pick = chain(sequence, replace(head, network=cast(Network, watched)))
        close(logits_of(pick), expected["mtp_logits"][i])
        close(mx.concatenate([hidden[0] for hidden in watched.hidden]), expected["mtp_hidden"][i])
        assert pick.draft == expected["mtp_tokens"][i].tolist()


@pytest.mark.parametrize("variant", QWEN)
def test_the_hidden_before_the_targets_last_norm_gives_other_drafts(variant: str) -> None:
    """A negative control: were the wrong hidden fed, the tests against torch would tell."""
    _, head = tiny_qwen(variant)
    expected = golden(variant)
    for i, bonus, text in golden_rounds(variant):
        last = mx.array([text[bonus]])
        for tag, name in (("mtp", "hidden"), ("mtp_prenorm", "prenorm")):
            state, cache = told(head, text[:bonus], expected[name][:bonus])
            pick = Recorder()
            head.draft(state, cache, last, STEPS, pick)
            close(logits_of(pick), expected[f"{tag}_logits"][i])
        assert np.abs(expected["mtp_logits"][i] - expected["mtp_prenorm_logits"][i]).max(-1).min() > 0.05


@pytest.mark.parametrize("variant", QWEN)
@pytest.mark.parametrize("step", [1, 7, 64, 512])
def test_a_prompt_read_in_chunks_leaves_torchs_keys_and_values(variant: str, step: int) -> None:
    """So no pair is lost or misplaced where one chunk ends and the next begins."""
    target, head = tiny_qwen(variant)
    expected = golden(variant)
    text = expected["tokens"].tolist()
    sequence = primed(target, head, [*text, 7], step)
    keys, values = pairs_of(sequence, len(text) - 1)
    close(keys, expected["mtp_keys"])
    close(values, expected["mtp_values"])


@pytest.mark.parametrize("variant", [DENSE, SPARSE])
@pytest.mark.parametrize("step", [1, 7, 64])
def test_the_size_of_the_chunks_does_not_change_the_drafts(variant: str, step: int) -> None:
    target, head = tiny_qwen(variant)
    text = varied_tokens(130)
    whole, chunked = primed(target, head, text), primed(target, head, text, step)
    same_memory(chunked, whole)
    expected = logits_of(chain(whole))
    close(logits_of(chain(chunked)), np.array(expected))


class Steered:
    """A head whose drafts are replaced: the first `right` tokens are true, then come wrong ones."""

    limit = MAX_BLOCK - 1
    reads_prompt = True
    nbytes = 0

    def __init__(self, head: Head, truth: list[int]):
        self.head, self.right = head, 0
        self.truth = mx.array(truth + [0] * MAX_BLOCK)

    def kv_bytes(self, tokens: int) -> int:
        return 0

    def reads(self, cache: Cache) -> int:
        return 0

    def start(self, cache: Cache) -> State:
        return self.head.start(cache)

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        return self.head.advance(state, cache, tokens, span, hidden, count)

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        if k:
            self.head.draft(state, cache, last, k, Recorder())  # leaves its guesses in the cache
        for j in range(k):
            token = self.truth[cache.position[:, None] + 1 + j]
            pick(certain(token if j < self.right else (token + 1) % VOCAB))


def steered(variant: str, truth: list[int], prompt: int) -> tuple[Sequence, Steered]:
    """A sequence that writes `truth` after its first `prompt` tokens, whatever the model would say."""
    target, head = tiny_qwen(variant)
    drafter = Steered(head, truth)
    sequence = open_sequence(target, drafter, Forced(mx.array(truth + [0] * MAX_BLOCK)))
    sequence.prefill(truth[:prompt], 512, lambda done, total: None)
    return sequence, drafter


def same_memory(sequence: Sequence, fresh: Sequence) -> None:
    """Both have read the same text: the head holds the same pairs and would begin its draft from the same hidden."""
    sequence.commit()
    assert sequence.length == fresh.length
    for mine, theirs in zip(pairs_of(sequence, fresh.length - 1), pairs_of(fresh, fresh.length - 1), strict=True):
        close(mine, np.array(theirs))
    close(sequence.state[0], np.array(fresh.state[0]))


@pytest.mark.parametrize("variant", QWEN)
def test_after_every_partial_acceptance_the_head_remembers_the_targets_hiddens(variant: str) -> None:
    """Nothing of its own guesses is left where the text has been written; the buffers grow on the way."""
    text = varied_tokens(320)
    sequence, drafter = steered(variant, text, 180)
    for k in range(1, 8):
        for drafter.right in range(k + 1):
            assert sequence.round(k).accepted == drafter.right
    assert sequence.length > 256
    target, head = tiny_qwen(variant)
    fresh = primed(target, head, text[: sequence.length + 1])
    same_memory(sequence, fresh)
    close(logits_of(chain(sequence, head)), np.array(logits_of(chain(fresh))))


def test_a_round_that_is_cut_short_and_a_second_prompt_are_remembered() -> None:
    """A stop inside an accepted run, then a conversation that goes on."""
    text = varied_tokens(60)
    sequence, drafter = steered(DENSE, text, 20)
    drafter.right = 5
    sequence.round(5)
    sequence.keep(2)
    sequence.prefill(text[22:40], 7, lambda done, total: None)
    target, head = tiny_qwen(DENSE)
    same_memory(sequence, primed(target, head, text[:40]))
    drafter.right = 1
    sequence.round(3)
    same_memory(sequence, primed(target, head, text[:42]))


@pytest.mark.parametrize("prompt", [1, 2, 20])
@pytest.mark.parametrize("depths", [[0, 0, 0, 3], [0, 3, 0, 0], [0]])
def test_rounds_without_a_draft_tell_the_head_everything(prompt: int, depths: list[int]) -> None:
    """A one-token prompt leaves nothing to read; the first round is a plain one then."""
    text = varied_tokens(40)
    sequence, drafter = steered(DENSE, text, prompt)
    assert sequence.ready == (prompt > 1)
    drafter.right = 2
    for k in depths:
        sequence.round(k)
    target, head = tiny_qwen(DENSE)
    fresh = primed(target, head, text[: sequence.length + 1])
    if fresh.length > 1:
        same_memory(sequence, fresh)
    close(logits_of(chain(sequence, head)), np.array(logits_of(chain(fresh))))


def test_the_bytes_of_a_head_are_its_own_tensors() -> None:
    _, head = tiny_qwen(DENSE)
    assert head.nbytes == sum(4 * array.size for array in parts(DENSE)[1].values())


# --------------------------------------------------------------------------- the forms of a head


@cache
def parts(variant: str) -> tuple[Tensors, Tensors]:
    """A fixture's tensors: those of the target, and those of the head under the names below `mtp.`."""
    trunk: Tensors = {}
    head: Tensors = {}
    for file in sorted((FIXTURES / variant).glob("model*.safetensors")):
        for name, array in read(file).items():
            if name.startswith("mtp."):
                head[name.removeprefix("mtp.")] = array
            else:
                trunk[name] = array
    return trunk, head


def read(file: Path) -> Tensors:
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    return tensors


def save(file: Path, tensors: Tensors, kind: str | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(file), tensors, {"format": kind} if kind else None)
    return file


def prefixed(tensors: Tensors, prefix: str = "mtp.") -> Tensors:
    return {prefix + name: array for name, array in tensors.items()}


def applied(tensors: Tensors) -> Tensors:
    """Norms, the only vectors of a head, as they are applied; exact in bfloat16 for the fixtures."""
    return {name: array + 1 if array.ndim == 1 else array for name, array in tensors.items()}


def stacked(tensors: Tensors, module: str = "switch_mlp.") -> Tensors:
    """Released experts under mlx-lm's names; without a module, ax-engine's."""
    split: Tensors = {}
    for name, array in tensors.items():
        base, _, last = name.partition("experts.")
        if last == "gate_up_proj":
            gate, up = mx.split(array, 2, axis=1)
            split |= {f"{base}{module}gate_proj.weight": gate, f"{base}{module}up_proj.weight": up}
        elif last == "down_proj":
            split[f"{base}{module}down_proj.weight"] = array
        else:
            split[name] = array
    return {name: mx.contiguous(array) for name, array in split.items()}


def one_by_one(tensors: Tensors) -> Tensors:
    """Released experts with a tensor for each."""
    split: Tensors = {}
    for name, array in stacked(tensors, "experts.").items():
        if array.ndim == 3:
            before, after = name.split("experts.")
            split |= {f"{before}experts.{e}.{after}": mx.contiguous(array[e]) for e in range(len(array))}
        else:
            split[name] = array
    return split


def headless(variant: str, folder: Path, index: bool = True) -> Path:
    """A fixture as a converter leaves it that drops the head but not the promise in config.json."""
    folder.mkdir()
    trunk, _ = parts(variant)
    for file in (FIXTURES / variant).glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    save(folder / "model.safetensors", trunk, "pt")
    if index:
        weight_map = dict.fromkeys(trunk, "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def split_folder(folder: Path, variant: str, head: Tensors) -> Path:
    """A repository of the head alone, as mlx-vlm writes it."""
    save(folder / "model.safetensors", stacked(applied(head)), "mlx")
    config = json.loads((FIXTURES / variant / "config.json").read_text())
    own = {"model_type": "qwen3_5_mtp", "text_config": config["text_config"], "block_size": 3}
    (folder / "config.json").write_text(json.dumps(own))
    return folder


def load_quietly(folder: Path, drafter: Path | str = "auto") -> Loaded:
    return load_pair(str(folder), str(drafter), mx.float32)


def parts_of(loaded: Loaded) -> tuple[Model, Head]:
    target, head = loaded.pair.target, loaded.pair.drafter
    assert isinstance(target, Model) and isinstance(head, Head), loaded.drafter_reason
    return target, head


def drafts_as_torch(loaded: Loaded, variant: str) -> None:
    i, bonus, text = list(golden_rounds(variant))[2]
    close(logits_of(chain(primed(*parts_of(loaded), text[: bonus + 1]))), golden(variant)["mtp_logits"][i])


# Each puts a raw head, by its bare names, somewhere near the folder of a target, and says what to give as the drafter.
Put = Callable[[Path, Tensors], Path | str]


def beside(name: str, change: Callable[[Tensors], Tensors], kind: str | None = None) -> Put:
    def put(folder: Path, head: Tensors) -> str:
        save(folder / name, change(head), kind)
        return "auto"

    return put


def raw(head: Tensors) -> Tensors:
    return prefixed(head)


def shifted(head: Tensors) -> Tensors:
    return prefixed(applied(head))


def in_the_targets_file(folder: Path, head: Tensors) -> str:
    save(folder / "model.safetensors", read(folder / "model.safetensors") | prefixed(head, "language_model.mtp."), "pt")
    (folder / "model.safetensors.index.json").unlink()
    return "auto"


FORMS: dict[str, Put] = {
    "model-mtp, from torch": beside("model-mtp.safetensors", raw, "pt"),
    "model-mtp, no format": beside("model-mtp.safetensors", raw),
    "model-mtp, as applied": beside("model-mtp.safetensors", shifted),
    "mtp, from torch": beside("mtp.safetensors", raw, "pt"),
    "mtp, no format": beside("mtp.safetensors", raw),
    "mtp, as applied": beside("mtp.safetensors", shifted, "mlx"),
    "mtp, bare names": beside("mtp.safetensors", applied),
    "mtp, wrapped names": beside("mtp.safetensors", lambda head: prefixed(head, "language_model.mtp.")),
    "mtp, model's names": beside("mtp.safetensors", lambda head: prefixed(head, "model.mtp.")),
    "a folder mtp": beside("mtp/weights.safetensors", shifted, "mlx"),
    "in the target's file": in_the_targets_file,
    "a file": lambda folder, head: save(folder.parent / "head.safetensors", raw(head)),
    "a folder without a config": lambda folder, head: save(folder.parent / "head/x.safetensors", shifted(head)).parent,
}
FORMS_OF_EXPERTS: dict[str, Put] = {
    "one by one": beside("mtp.safetensors", lambda head: prefixed(one_by_one(head))),
    "stacked": beside("mtp.safetensors", lambda head: prefixed(stacked(applied(head)))),
    "stacked as in ax-engine": beside("mtp.safetensors", lambda head: prefixed(stacked(applied(head), ""))),
}
EVERY_FORM = [(DENSE, form) for form in FORMS] + [(SPARSE, form) for form in [*FORMS, *FORMS_OF_EXPERTS]]


@pytest.mark.parametrize(("variant", "form"), EVERY_FORM)
def test_every_form_of_a_head_drafts_as_the_one_inside_the_checkpoint(variant: str, form: str, tmp_path: Path) -> None:
    """Whole files, shards, fused experts and experts one by one are the fixtures' own forms."""
    folder = headless(variant, tmp_path / "target")
    drafter = (FORMS | FORMS_OF_EXPERTS)[form](folder, parts(variant)[1])
    drafts_as_torch(load_quietly(folder, drafter), variant)


@pytest.mark.parametrize("variant", [DENSE, SPARSE])
def test_a_folder_of_the_head_alone_drafts_the_same(variant: str, tmp_path: Path) -> None:
    """As mlx-vlm publishes them, named or put into the target's folder."""
    folder = headless(variant, tmp_path / "target")
    drafter = split_folder(tmp_path / "head", variant, parts(variant)[1])
    drafts_as_torch(load_quietly(folder, drafter), variant)
    shutil.move(drafter, folder / "assistant")
    loaded = load_quietly(folder)
    drafts_as_torch(loaded, variant)
    assert loaded.drafter == str(folder / "assistant")


def test_a_folder_of_the_head_alone_with_released_names_is_read_by_its_values(tmp_path: Path) -> None:
    """Its type says that mlx-vlm wrote it, its names that somebody else did."""
    folder = headless(DENSE, tmp_path / "target")
    drafter = split_folder(tmp_path / "head", DENSE, parts(DENSE)[1])
    save(drafter / "model.safetensors", raw(parts(DENSE)[1]))
    drafts_as_torch(load_quietly(folder, drafter), DENSE)


def test_the_reason_names_where_a_head_was_found(tmp_path: Path) -> None:
    inside = load_quietly(FIXTURES / "qwen3_5_tied")
    assert (inside.drafter, "inside the checkpoint" in inside.drafter_reason) == (str(FIXTURES / "qwen3_5_tied"), True)
    folder = headless("qwen3_5_tied", tmp_path / "target")
    file = save(folder / "mtp.safetensors", raw(parts("qwen3_5_tied")[1]))
    found = load_quietly(folder)
    assert (found.drafter, "beside" in found.drafter_reason) == (str(file), True)


@pytest.mark.parametrize("change", [raw, shifted])
def test_a_head_that_is_named_like_a_shard_is_read_by_its_own_convention(
    change: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    """The target's files are raw here, and nothing but its name makes the head one of them."""
    folder = headless(DENSE, tmp_path / "target", index=False)
    save(folder / "model-mtp.safetensors", change(parts(DENSE)[1]))
    drafts_as_torch(load_quietly(folder), DENSE)


@pytest.mark.parametrize(("variant", "bits", "size"), [(DENSE, 4, 32), (DENSE, 8, 64), (SPARSE, 8, 32)])
def test_a_quantised_head_needs_no_entry_in_the_targets_config(
    variant: str, bits: int, size: int, tmp_path: Path
) -> None:
    packed: Tensors = {}
    rounded: Tensors = {}
    for name, array in stacked(applied(parts(variant)[1])).items():
        if array.ndim == 1 or array.shape[-1] % size:
            packed[name] = rounded[name] = array
            continue
        three = mx.quantize(array.astype(mx.float32), group_size=size, bits=bits)
        stem = name.removesuffix("weight")
        packed |= {stem + part: value for part, value in zip(("weight", "scales", "biases"), three, strict=True)}
        rounded[name] = mx.dequantize(*three, group_size=size, bits=bits)
    folder = headless(variant, tmp_path / "target")
    drafts, sizes = [], []
    for tensors in (packed, rounded):
        save(folder / "mtp.safetensors", prefixed(tensors), "mlx")
        target, head = parts_of(load_quietly(folder))
        drafts.append(logits_of(chain(primed(target, head, varied_tokens(20)))))
        sizes.append(head.nbytes)
    close(drafts[0], np.array(drafts[1]))
    assert sizes[0] < sizes[1] / 2


# --------------------------------------------------------------------------- target and head from different places


@cache
def agreeable(variant: str) -> tuple[list[int], list[int]]:
    """A text in whose rounds of three drafts the released pair's head is right 0, 1, 2, 3, 0, ... times.

    A tiny random model accepts next to nothing, and two heads that are both wrong cannot be told apart.
    """
    target, head = tiny_qwen(variant)
    text, other = varied_tokens(20), varied_tokens(40, seed=1)
    sequence = primed(target, head, text)
    rights = []
    for i, token in enumerate(other[:12]):
        drafts = chain(sequence).draft
        text = [*text, *drafts[: i % 4], token]
        sequence.chooser = Rules(Forced(mx.array(text + [0] * 4)), drafts="argmax")
        rights.append(sequence.round(3).accepted)
    assert rights == [0, 1, 2, 3] * 3
    return text, rights


def accepted(loaded: Loaded, text: list[int]) -> list[int]:
    target, head = parts_of(loaded)
    return run_rounds(target, head, Forced(mx.array(text + [0] * 4)), text[:20], len(text) - 20, 3)[2]


@pytest.mark.parametrize("variant", [DENSE, SPARSE, "qwen3_next"])
def test_a_converted_target_with_a_raw_head_accepts_what_the_released_pair_does(variant: str, tmp_path: Path) -> None:
    """mlx-lm's convert drops the head and shifts the target's norms; the head is fetched from the original."""
    folder = tmp_path / "converted"
    convert(str(float32_copy(variant, tmp_path / "wide")), str(folder), dtype="float32")
    assert not any("mtp" in name for file in folder.glob("*.safetensors") for name in read(file))
    text, rights = agreeable(variant)
    from_original = load_quietly(folder, FIXTURES / variant)
    drafts_as_torch(from_original, variant)
    assert accepted(from_original, text) == rights
    save(folder / "model-mtp.safetensors", raw(parts(variant)[1]))
    from_sidecar = load_quietly(folder)
    drafts_as_torch(from_sidecar, variant)
    assert accepted(from_sidecar, text) == rights


@pytest.mark.parametrize("variant", [DENSE, SPARSE])
def test_a_raw_target_with_a_shifted_head_accepts_what_the_released_pair_does(variant: str, tmp_path: Path) -> None:
    folder = headless(variant, tmp_path / "target")
    save(folder / "mtp.safetensors", shifted(parts(variant)[1]))
    text, rights = agreeable(variant)
    loaded = load_quietly(folder)
    drafts_as_torch(loaded, variant)
    assert accepted(loaded, text) == rights


def test_a_head_read_in_the_wrong_convention_accepts_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would prove nothing."""
    folder = headless(DENSE, tmp_path / "target")
    save(folder / "mtp.safetensors", raw(parts(DENSE)[1]), "pt")
    text, rights = agreeable(DENSE)
    monkeypatch.setattr(qwen3_5_mtp, "convention", lambda *_, **__: Convention(False, "wrong"))
    assert sum(accepted(load_quietly(folder), text)) < sum(rights) / 2


def test_a_declaration_that_the_values_rule_out_is_overruled_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = headless(DENSE, tmp_path / "target")
    save(folder / "mtp.safetensors", raw(parts(DENSE)[1]), "pt")
    (folder / "mtplx_runtime.json").write_text('{"mtp_norm_layout": "mlx_multiplier"}')
    drafts_as_torch(load_quietly(folder), DENSE)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "mtp_norm_layout" in record.getMessage() and "rules out" in record.getMessage()


# --------------------------------------------------------------------------- how norms are stored

INPUT, POST = "layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight"
EMBEDDING, HIDDEN, NORM = "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight"
QUERY, KEY = "layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight"
NAMES = (INPUT, POST, QUERY, KEY, HIDDEN, EMBEDDING, NORM)

# Means of published heads, raw, in the order of NAMES.
PUBLISHED = {
    "dense, lowest": (0.03, 0.21, 0.73, 0.73, -0.50, -0.73, 1.25),
    "dense, highest": (0.30, 0.39, 0.79, 0.79, -0.16, -0.41, 2.58),
    "35B": (0.10, 0.30, 0.75, 0.75, -0.506, -0.727, 1.80),
    "lowest of all": (-0.13, -0.13, 0.73, 0.73, -0.50, -0.73, 1.25),
    "highest of all": (0.40, 0.40, 0.79, 0.79, -0.16, -0.41, 2.58),
}


def norms(means: tuple[float, ...], more: float = 0.0) -> Tensors:
    """Norms with these means, `more` added to all, each value a little off."""
    spread = mx.linspace(-0.2, 0.2, 64)
    return {name: mean + more + spread for name, mean in zip(NAMES, means, strict=True)}


@pytest.mark.parametrize("means", PUBLISHED)
@pytest.mark.parametrize("stored_raw", [True, False])
@pytest.mark.parametrize("metadata", [None, "mlx"])
def test_the_norms_of_published_heads_tell_how_they_are_stored(
    means: str, stored_raw: bool, metadata: str | None
) -> None:
    """Raw norms of queries and keys look applied, applied norms before `fc` look raw: neither may decide."""
    tensors = norms(PUBLISHED[means], 0.0 if stored_raw else 1.0)
    decided = convention(prefixed(tensors), None, False, metadata)
    assert decided.raw == stored_raw and "layer norms" in decided.reason and not decided.overruled
    assert exceptions(tensors, stored_raw) == []


CONVOLUTION = "model.language_model.layers.0.linear_attn.conv1d.weight"
RAW_CONVOLUTION, MLX_CONVOLUTION = {CONVOLUTION: mx.zeros((8, 1, 4))}, {CONVOLUTION: mx.zeros((8, 4, 1))}
LOOKS_RAW, LOOKS_APPLIED = prefixed(norms(PUBLISHED["35B"])), prefixed(norms(PUBLISHED["35B"], 1.0))
UNCLEAR = prefixed(norms(PUBLISHED["35B"], 0.4))
DECLARED = Convention(False, "so it says")


@pytest.mark.parametrize(
    ("tensors", "declared", "split", "metadata", "stored_raw", "reason"),
    [
        (UNCLEAR | RAW_CONVOLUTION, DECLARED, False, "pt", False, "so it says"),
        (UNCLEAR, Convention(True, "so it says"), True, "mlx", True, "so it says"),
        (UNCLEAR | RAW_CONVOLUTION, None, True, None, True, "convolutions"),
        (UNCLEAR, None, True, "pt", False, "type qwen3_5_mtp"),
        (UNCLEAR, None, False, "pt", True, "torch"),
        (LOOKS_RAW | RAW_CONVOLUTION, DECLARED, False, "pt", True, "rules out what the format says: so it says"),
        (LOOKS_APPLIED | RAW_CONVOLUTION, None, False, None, False, "rules out what the format says: the convolutions"),
        (LOOKS_RAW, None, True, "mlx", True, "rules out what the format says: a folder of type qwen3_5_mtp"),
        (LOOKS_APPLIED, None, False, "pt", False, "rules out what the format says: the file was written by torch"),
        (LOOKS_RAW | MLX_CONVOLUTION, None, False, None, True, "layer norms"),
        (LOOKS_APPLIED | MLX_CONVOLUTION, None, False, "mlx", False, "layer norms"),
        (LOOKS_RAW, None, False, "pt", True, "torch"),
        (LOOKS_RAW, None, False, None, True, "layer norms' mean of 0.20"),
        (LOOKS_APPLIED, None, False, None, False, "layer norms' mean of 1.20"),
    ],
)
def test_the_strongest_evidence_decides_and_is_named(
    tensors: Tensors, declared: Convention | None, split: bool, metadata: str | None, stored_raw: bool, reason: str
) -> None:
    decided = convention(tensors, declared, split, metadata)
    assert decided.raw == stored_raw and reason in decided.reason


@pytest.mark.parametrize(
    ("stored_raw", "other", "shift"),
    [
        (True, [INPUT], 1.0),
        (True, [INPUT, POST], 1.0),
        (False, [EMBEDDING, HIDDEN, NORM], -1.0),
    ],
)
def test_norms_stored_the_other_way_than_the_rest_of_their_file_are_put_right(
    stored_raw: bool, other: list[str], shift: float
) -> None:
    tensors = norms(PUBLISHED["35B"], 0.0 if stored_raw else 1.0)
    mixed = tensors | {name: tensors[name] + shift for name in other}
    assert exceptions(mixed, stored_raw) == sorted(other)
    expected = norms(PUBLISHED["35B"], 1.0)
    for name, array in sanitize(prefixed(mixed), stored_raw).items():
        np.testing.assert_allclose(np.array(array), np.array(expected[name]), atol=1e-6)


@pytest.mark.parametrize(
    ("file", "key", "value", "stored_raw"),
    [
        ("mtplx_runtime.json", "mtp_norm_layout", "mlx_multiplier", False),
        ("mtplx_runtime.json", "mtp_norm_layout", "raw_hf_delta", True),
        ("manifest.json", "rmsnorm_weight_format", "mlx_gamma", False),
        ("config.json", "mtp_norm_encoding", "delta", True),
        ("config.json", "mtplx_mtp_norm_encoding", "delta_plus_one", True),
        ("config.json", "mtplx_mtp_norm_encoding", "something new", None),
        ("config.json", "mtp_norm_encoding", ["delta"], None),
    ],
)
def test_what_other_programs_declare_is_read(
    file: str, key: str, value: object, stored_raw: bool | None, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps({key: value}))
    declared = _declared_convention(tmp_path)
    assert (None if declared is None else declared.raw) == stored_raw
    assert declared is None or (key in declared.reason and file in declared.reason)


@pytest.mark.parametrize(("change", "words"), [(raw, "stored as the difference from 1"), (shifted, "as applied")])
def test_the_convention_is_logged_with_its_reason(
    change: Callable[[Tensors], Tensors], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = headless("qwen3_5_tied", tmp_path / "target")
    file = save(folder / "mtp.safetensors", change(parts("qwen3_5_tied")[1]))
    with caplog.at_level(logging.INFO, "mtp_mlx.loading"):
        load_quietly(folder)
    [record] = [record for record in caplog.records if record.name == "mtp_mlx.loading"]
    assert record.levelno == logging.INFO
    assert all(part in record.getMessage() for part in (str(file), words, "layer norms' mean"))


def test_a_file_that_mixes_conventions_drafts_right_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = headless(DENSE, tmp_path / "target")
    head = parts(DENSE)[1]
    save(folder / "mtp.safetensors", prefixed(head | {POST: head[POST] + 1}), "pt")
    drafts_as_torch(load_quietly(folder), DENSE)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert POST in record.getMessage() and "stored the other way" in record.getMessage()


def test_a_head_is_found_among_other_tensors_by_its_names() -> None:
    array = mx.zeros(1)
    for prefix in ("mtp.", "model.mtp.", "language_model.mtp.", "model.language_model.mtp."):
        assert own_tensors({f"{prefix}fc.weight": array, "model.norm.weight": array}) == {"fc.weight": array}
    assert own_tensors({"pre_fc_norm_hidden.weight": array}) == {"pre_fc_norm_hidden.weight": array}
    assert own_tensors({"model.norm.weight": array, "model.attempt.weight": array}) == {}


# --------------------------------------------------------------------------- missing, foreign and damaged heads

HELP = "the original repository has them"


def test_a_promised_head_that_is_missing_means_plain_decoding_and_how_to_get_it(tmp_path: Path) -> None:
    folder = headless("qwen3_5_tied", tmp_path / "target")
    loaded = load_quietly(folder)
    assert isinstance(loaded.pair.drafter, NoDrafter) and loaded.drafter is None
    for words in ("promises an mtp head", "prompt lookup", HELP, "model-mtp.safetensors", "--drafter", str(folder)):
        assert words in loaded.drafter_reason
    edit_config(folder, lambda config: config["text_config"].update(mtp_num_hidden_layers=0))
    unpromised = load_quietly(folder)
    assert isinstance(unpromised.pair.drafter, NoDrafter)
    assert "promises" not in unpromised.drafter_reason and HELP in unpromised.drafter_reason


def test_a_folder_or_file_without_a_head_is_refused_as_the_drafter(tmp_path: Path) -> None:
    folder = headless("qwen3_5_tied", tmp_path / "target")
    for drafter in (folder, folder / "model.safetensors"):
        with pytest.raises(PairError, match="holds no mtp head") as caught:
            load_quietly(folder, drafter)
        assert HELP in str(caught.value) and str(drafter) in str(caught.value)


def test_a_head_of_another_width_is_refused_with_both_sizes(tmp_path: Path) -> None:
    wide = parts(DENSE)[1] | {HIDDEN: mx.zeros(96)}
    folder = headless(DENSE, tmp_path / "target")
    save(folder / "mtp.safetensors", raw(wide))
    message = "expects hidden size 96, the target has 64; use the head of this target"
    for drafter in ("auto", folder / "mtp.safetensors", split_folder(tmp_path / "head", DENSE, wide)):
        with pytest.raises(PairError, match=message):
            load_quietly(folder, drafter)


def test_a_config_that_is_not_the_heads_is_refused(tmp_path: Path) -> None:
    drafter = split_folder(tmp_path / "head", DENSE, parts(DENSE)[1])
    edit_config(drafter, lambda config: config["text_config"].update(hidden_size=96))
    with pytest.raises(CheckpointError, match=r"has shape .*, its config means \(.*96"):
        load_quietly(FIXTURES / DENSE, drafter)


def test_a_drafter_of_the_other_family_is_refused(tmp_path: Path) -> None:
    gemma = FIXTURES / "gemma4_keqv"
    with pytest.raises(PairError, match="'gemma4_assistant', which does not draft for 'qwen3_5' targets"):
        load_quietly(FIXTURES / "qwen3_5_tied", gemma / "assistant")
    with pytest.raises(PairError, match="'qwen3_5', which does not draft for 'gemma4' targets"):
        load_quietly(gemma, FIXTURES / "qwen3_5_tied")
    with pytest.raises(PairError, match="drafters of 'gemma4' targets are folders"):
        load_quietly(gemma, save(tmp_path / "head.safetensors", raw(parts(DENSE)[1])))


def test_a_head_alone_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a drafter; give its target with --model"):
        load_quietly(split_folder(tmp_path / "head", DENSE, parts(DENSE)[1]))


def test_flash_next_is_refused_by_name(tmp_path: Path) -> None:
    """Its type begins as Qwen's do, but its layers and its head are others."""
    drafter = split_folder(tmp_path / "head", DENSE, parts(DENSE)[1])
    edit_config(drafter, lambda config: config.update(model_type="qwen4_exp_mtp"))
    for model, given in ((FIXTURES / DENSE, drafter), (drafter, "auto")):
        with pytest.raises(CheckpointError, match=r"'qwen4_exp_mtp' \(Flash-Next\).* not supported"):
            load_quietly(model, given)
    edit_config(drafter, lambda config: config.update(model_type="qwen3_5_mtp"))
    edit_config(drafter, lambda config: config["text_config"].update(model_type="qwen4_exp_text"))
    with pytest.raises(CheckpointError, match="'qwen4_exp_text'"):
        load_quietly(FIXTURES / DENSE, drafter)


def test_a_damaged_head_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where it was asked for, that is an error; a file that merely lies there is passed over, with a warning."""
    folder = headless("qwen3_5_tied", tmp_path / "target")
    file = save(folder / "mtp.safetensors", raw(parts("qwen3_5_tied")[1]))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short") as caught:
        load_quietly(folder, file)
    assert str(file) in str(caught.value)
    assert isinstance(load_quietly(folder).pair.drafter, NoDrafter)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(file) in record.getMessage()


def test_stray_files_do_not_keep_a_head_from_being_found(tmp_path: Path) -> None:
    folder = headless(DENSE, tmp_path / "target")
    save(folder / "mtp.safetensors", raw(parts(DENSE)[1]))
    (folder / "adapters.safetensors").write_bytes(b"")
    (folder / "a.safetensors").mkdir()
    (folder / "assistant").mkdir()
    (folder / "manifest.json").write_text("[]")
    (folder / "mtplx_runtime.json").write_text("{")
    drafts_as_torch(load_quietly(folder), DENSE)


def test_a_folder_called_like_a_demo_is_read_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURES / DENSE, tmp_path / "demo-qwen")
    monkeypatch.chdir(tmp_path)
    drafts_as_torch(load_pair("./demo-qwen", "auto", mx.float32), DENSE)
    assert load(Path("demo-qwen"), drafter=None, dtype=mx.float32)[0].pair.target.vocabulary == 320


def test_a_head_that_cannot_be_run_does_not_keep_its_target_from_running(tmp_path: Path) -> None:
    for key, value in (("mtp_use_dedicated_embeddings", True), ("mtp_num_hidden_layers", 2)):
        folder = Path(shutil.copytree(FIXTURES / DENSE, tmp_path / key))
        edit_config(folder, lambda config: config["text_config"].update({key: value}))  # noqa: B023
        assert isinstance(load_quietly(folder, "none").pair.drafter, NoDrafter)
        with pytest.raises(CheckpointError, match=f"{key} is"):
            load_quietly(folder)


def test_a_head_computes_in_its_targets_precision(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / DENSE, tmp_path / "target"))
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    half = {name: a if "mtp" in name else a.astype(mx.float16) for name, a in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half, {"format": "pt"})
    head = load_pair(str(folder)).pair.drafter
    assert isinstance(head, Head) and head.network.fc.weight.dtype == mx.float16


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("nosuch/mtp.safetensors", str(tmp_path / "mtp.safetensors")):
        with pytest.raises(CheckpointError, match=f"there is no file {name}"):
            load_quietly(FIXTURES / DENSE, name)


def _without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda head: {name: array for name, array in head.items() if name not in names}


EXPERT = "layers.0.mlp.experts.{}.up_proj.weight"
INCOMPLETE: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "no fc": (DENSE, _without("fc.weight"), r"lacks 1 tensor \(fc\.weight\)"),
    "no layer norm": (DENSE, _without(INPUT), "lacks 1 tensor .*input_layernorm"),
    "norms only": (DENSE, lambda head: {HIDDEN: head[HIDDEN]}, "lacks 14 tensors"),
    "one more": (DENSE, lambda head: head | {"layers.1.mlp.up_proj.weight": mx.zeros((4, 4))}, "layers.1.mlp"),
    "misshapen": (DENSE, lambda head: head | {"fc.weight": mx.zeros((64, 64))}, r"fc.weight has shape \(64, 64\)"),
    "an expert": (SPARSE, lambda head: _without(EXPERT.format(1))(one_by_one(head)), "lacks expert 1 of 4"),
    "the last expert": (SPARSE, lambda head: _without(EXPERT.format(3))(one_by_one(head)), "up_proj.weight has shape"),
    "all experts": (SPARSE, lambda head: {name: a for name, a in head.items() if a.ndim < 3}, "lacks 3 tensors"),
    "a dense head": (SPARSE, lambda head: parts(DENSE)[1], "lacks .*mlp"),
}


@pytest.mark.parametrize("damage", INCOMPLETE)
def test_an_incomplete_head_is_refused_and_what_it_lacks_is_named(damage: str, tmp_path: Path) -> None:
    variant, change, message = INCOMPLETE[damage]
    file = save(tmp_path / "head.safetensors", prefixed(change(parts(variant)[1])))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_quietly(FIXTURES / variant, file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
