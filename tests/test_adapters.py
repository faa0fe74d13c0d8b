"""A fine-tune in mlx-lm's format: what mlx-lm writes with it, and MTP with the official drafter changes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from conftest import FIXTURES, DialledDrafter, Forced, float32_copy, gap, one_pass, run_rounds, varied_tokens
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from test_rounds import EXACT

from mtp_mlx.errors import CheckpointError
from mtp_mlx.loading import load, load_pair

VARIANTS = ["gemma4_ple", "gemma4_moe", "qwen3_5_tied", "qwen3_5_moe"]


def _train(variant: str, folder: Path, kind: str = "lora", keys: list[str] | None = None) -> Path:
    """An adapter as mlx_lm.lora writes it, with random weights in place of learnt ones; the folder of its base."""
    base = float32_copy(variant, folder / "base")
    model = mlx_lm.load(str(base))[0]
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.1} | ({"keys": keys} if keys else {})
    config: dict[str, Any] = {
        "fine_tune_type": kind,
        "num_layers": 4,
        "lora_parameters": parameters,
        "model": str(base),
    }
    names = {"lora_a", "lora_b", "m"}
    if kind == "full":
        names = {"weight"}
    else:
        linear_to_lora_layers(model, 4, dict(parameters), use_dora=kind == "dora")
    mx.random.seed(3)
    changed = {
        name: array + 0.1 * mx.random.normal(array.shape)
        for name, array in dict[str, mx.array](tree_flatten(model.parameters())).items()
        if name.rpartition(".")[2] in names and (kind != "full" or "layers.1.mlp" in name)
    }
    adapter = folder / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), changed)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_fine_tuned_target_says_what_mlx_lm_says_and_mtp_changes_nothing(
    variant: str, kind: str, tmp_path: Path
) -> None:
    if kind == "dora" and "moe" in variant:
        pytest.skip("mlx-lm has no DoRA for experts")
    keys = ["self_attn.q_proj", "mlp.down_proj", "linear_attn.out_proj"] if kind == "dora" else None
    base = _train(variant, tmp_path, kind, keys)
    adapter = tmp_path / "adapter"
    theirs = mlx_lm.load(str(base), adapter_path=str(adapter))[0]
    theirs.update(tree_map(lambda array: array.astype(mx.float32), theirs.parameters()))
    loaded = load_pair(str(base), dtype=mx.float32, adapter=str(adapter))
    assert loaded.adapter is not None and loaded.adapter.startswith(f"{adapter}: ")
    text = varied_tokens(40)
    logits = theirs(mx.array(text)[None])[0, 19:-1]
    forced, nobody = Forced(mx.array(text + [0] * 8)), DialledDrafter.dial([], 0.0)
    pair = loaded.pair
    _, rows, _ = run_rounds(pair.target, nobody, forced, text[:20], 20, 0)
    assert gap(rows, logits - mx.logsumexp(logits, axis=-1, keepdims=True)) < 1e-3
    before = one_pass(load(base, drafter=None, dtype=mx.float32)[0].pair.target, text)[19:-1]
    assert gap(rows, before) > 0.01, "the adapter does nothing"
    for drafter in (pair.drafter, DialledDrafter.every_partial(text, 20, 4)):
        assert gap(run_rounds(pair.target, drafter, forced, text[:20], 20, 4)[1], rows) < EXACT


def test_an_adapter_on_a_quantised_target(tmp_path: Path) -> None:
    base = _train("gemma4_keqv", tmp_path, keys=["self_attn.q_proj"])
    mlx_lm.convert(str(base), str(tmp_path / "quantised"), quantize=True, q_bits=8, q_group_size=32, dtype="float32")
    pair = load(
        tmp_path / "quantised", drafter=base / "assistant", dtype=mx.float32, adapter_path=tmp_path / "adapter"
    )[0].pair
    text = varied_tokens(50)
    forced, nobody = Forced(mx.array(text + [0] * 8)), DialledDrafter.dial([], 0.0)
    _, rows, _ = run_rounds(pair.target, nobody, forced, text[:20], 30, 0)
    assert gap(run_rounds(pair.target, pair.drafter, forced, text[:20], 30, 3)[1], rows) < EXACT


def test_what_is_no_adapter_for_this_target_is_refused(tmp_path: Path) -> None:
    base, adapter = _train("gemma4_keqv", tmp_path, keys=["self_attn.q_proj"]), tmp_path / "adapter"

    def refused(match: str, model: Path = base, change: Any = None, folder: Path = adapter) -> None:
        broken = Path(shutil.copytree(folder, tmp_path / "broken")) if change else folder
        if change:
            change(broken)
        with pytest.raises(CheckpointError, match=match):
            load(model, drafter=None, adapter_path=broken)
        if change:
            shutil.rmtree(broken)

    def configured(**values: Any) -> Any:
        def write(broken: Path) -> None:
            config = json.loads((broken / "adapter_config.json").read_text()) | values
            (broken / "adapter_config.json").write_text(json.dumps(config))

        return write

    refused("has no adapter_config.json; give the folder that mlx_lm.lora", folder=base)
    refused("it was made for another", model=FIXTURES / "gemma4_ple")
    refused("PEFT", change=configured(peft_type="LORA"))
    refused("fine_tune_type 'galore'; known are lora, dora and full", change=configured(fine_tune_type="galore"))
    refused("whole rank from 1 to", change=configured(lora_parameters={"rank": 8, "alpha": 16}))
    whole: dict[str, Any] = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    wrong: dict[str, list[Any]] = {
        "scale": [None, "x"], "rank": [0, "4", 10**15], "keys": [5, [], "self_attn.q_proj"], "dropout": [float("nan")],
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            refused("whole rank from 1 to", change=configured(lora_parameters=whole | {name: value}))

    def whole_numbers(broken: Path) -> None:
        tensors = mx.load(str(broken / "adapters.safetensors"))
        assert isinstance(tensors, dict)
        mx.save_safetensors(
            str(broken / "adapters.safetensors"), {name: array.astype(mx.int32) for name, array in tensors.items()}
        )

    refused("expected floating-point numbers", change=whole_numbers)
    refused("is not a folder", folder=tmp_path / "nowhere")
    refused("is not there", change=lambda broken: (broken / "adapters.safetensors").unlink())
    refused("damaged or cut short", change=lambda broken: (broken / "adapters.safetensors").write_bytes(b"12345678"))
    refused(
        "lacks 8 tensors",
        change=configured(
            lora_parameters={"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.o_proj"]}
        ),
    )
    refused(
        "has shape",
        change=configured(lora_parameters={"rank": 5, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}),
    )
    refused("is empty", change=lambda broken: mx.save_safetensors(str(broken / "adapters.safetensors"), {}))
    with pytest.raises(CheckpointError, match=f"is an adapter, not a model; use --model {base} --adapter {adapter}"):
        load(adapter)
