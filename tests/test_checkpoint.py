"""A file from a stranger is believed nothing: sizes are compared before memory is asked for, and no code is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from loopback import FIXTURES, Loopback

from mtp_mlx.checkpoint import Header, header_length, read_header, shard_names
from mtp_mlx.errors import CheckpointError
from mtp_mlx.hub import Remote
from mtp_mlx.loading import load

WEIGHTS = "model.safetensors"


def safetensors(header: bytes, data: int, length: int | None = None) -> bytes:
    """A file with this header and so many bytes of tensors, perhaps with a length that is a lie."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header"),
    "header longer than the file": (safetensors(b"{}", 0, 10**6), "header of 1000000 bytes in a file of 10"),
    "header of an exabyte": (safetensors(b"{}", 0, 2**60), "header of 1152921504606846976 bytes"),
    "header beyond the format's limit": (safetensors(b"{}", 0, 100_000_001), "header of 100000001 bytes"),
    "no JSON": (safetensors(b"{'a': 1}", 0), "property name"),
    "nested without end": (safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0), "nested too deeply"),
    "a list": (safetensors(b"[]", 0), "no object"),
    "a tensor that is a list": (safetensors(b'{"a": []}', 0), "a is described as"),
    "huge shape": (safetensors(f'{{"a": {entry(shape=[10**6, 10**6])}}}'.encode(), 8), "8 bytes for F32 of shape"),
    "shape beyond 64 bits": (safetensors(f'{{"a": {entry(shape=[2**40, 2**40])}}}'.encode(), 8), "8 bytes for F32"),
    "negative shape": (safetensors(f'{{"a": {entry(shape=[-1, -2])}}}'.encode(), 8), "no sizes"),
    "shape of fractions": (safetensors(f'{{"a": {entry(shape=[2.0])}}}'.encode(), 8), "no sizes"),
    "shape of truths": (safetensors(f'{{"a": {entry(shape=[True, 2])}}}'.encode(), 8), "no sizes"),
    "unknown dtype": (safetensors(f'{{"a": {entry(dtype="F7")}}}'.encode(), 8), "described as"),
    "dtype that is a list": (safetensors(f'{{"a": {entry(dtype=["F32"])}}}'.encode(), 8), "described as"),
    "overlap": (
        safetensors(f'{{"a": {entry()}, "b": {entry(begin=4, end=12)}}}'.encode(), 12),
        "b begins at byte",
    ),
    "gap": (safetensors(f'{{"a": {entry()}, "b": {entry(begin=12, end=20)}}}'.encode(), 20), "b begins at byte"),
    "the same bytes twice": (safetensors(f'{{"a": {entry()}, "b": {entry()}}}'.encode(), 8), "b begins at byte"),
    "beyond the file": (safetensors(f'{{"a": {entry(shape=[200], end=800)}}}'.encode(), 8), "in a file of"),
    "more than the tensors": (safetensors(f'{{"a": {entry()}}}'.encode(), 800), "in a file of"),
    "a name twice": (safetensors(f'{{"a": {entry()}, "a": {entry()}}}'.encode(), 8), "a name that stands twice"),
}


@pytest.mark.parametrize("damage", FILES)
def test_a_header_that_lies_is_refused(damage: str, tmp_path: Path) -> None:
    content, message = FILES[damage]
    with pytest.raises(ValueError, match=message):
        length = header_length(content[:8], len(content))
        Header.parse(content[:8], content[8 : 8 + length], len(content))
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="download it again") as caught:
        read_header(tmp_path / WEIGHTS)
    assert "\n" not in str(caught.value)


def test_a_header_that_lies_is_refused_from_afar(hub: Loopback) -> None:
    for content, _ in FILES.values():
        hub.add("a/b", None, {WEIGHTS: content})
        with pytest.raises(CheckpointError, match="of a/b is damaged"):
            Remote.open("a/b").header(WEIGHTS)


def test_every_dtype_of_the_format_is_known(tmp_path: Path) -> None:
    kinds = [mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int16, mx.uint32, mx.int32, mx.uint64, mx.int64]
    kinds += [mx.float16, mx.bfloat16, mx.float32, mx.complex64]
    mx.save_safetensors(str(tmp_path / WEIGHTS), {str(kind): mx.zeros((3, 8), kind) for kind in kinds})
    assert len(read_header(tmp_path / WEIGHTS).tensors) == len(kinds)


@pytest.mark.parametrize(
    "shard", ["../a", "a/../../b", "/etc/a", "..\\a", "C:\\a", "C:a", "\\\\host\\a", "a\0", "a\n", "mtp/a", "~/a/b"]
)
def test_an_index_may_name_only_files_beside_it(shard: str) -> None:
    with pytest.raises(CheckpointError, match="outside the folder; refused"):
        shard_names({"weight_map": {"x": f"{shard}.safetensors"}}, [], "here")


@pytest.mark.parametrize("trick", ["loop", "device", "pipe", "folder"])
def test_a_weight_file_that_is_no_file_is_refused(trick: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "model"))
    weights = folder / WEIGHTS
    weights.unlink()
    tricks: dict[str, Callable[[], object]] = {
        "loop": lambda: weights.symlink_to(weights),
        "device": lambda: weights.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(weights),
        "folder": weights.mkdir,
    }
    tricks[trick]()
    with pytest.raises(CheckpointError, match=r"is not there or no file|has no model\*"):
        load(folder)


SIZES = {
    "hidden_size": 10**12,
    "vocab_size": 10**12,
    "intermediate_size": 2**40,
    "head_dim": 2**40,
    "num_attention_heads": 10**12,
    "num_key_value_heads": 10**12,
    "num_hidden_layers": 10**9,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", ["gemma4_keqv", "qwen3_5_dense"])
def test_sizes_beyond_the_files_are_refused_before_anything_is_built(size: str, model: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][size] = SIZES[size]
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"says {size} {SIZES[size]}, which is beyond the .* tensors") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_no_code_of_a_repository_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mark = Path(shutil.copytree(FIXTURES / "gemma4_keqv", tmp_path / "model")), tmp_path / "ran"
    for module in ("tokenization_evil", "configuration_evil", "modeling_evil"):
        (folder / f"{module}.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    tokenizers = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    for name, changes in {
        "config.json": {"auto_map": classes | tokenizers, "model_file": "modeling_evil.py"},
        "tokenizer_config.json": {"auto_map": tokenizers, "tokenizer_class": "Evil"},
    }.items():
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # where transformers asks, somebody says yes
    try:
        load(folder)
    except CheckpointError as error:
        assert "tokenizer" in str(error) and "\n" not in str(error)
    assert not mark.exists()
