"""A checkpoint folder: its config, its tensors, its quantisation, each checked before anything is allocated."""

import fnmatch
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from safetensors import SafetensorError, safe_open

from mtp_mlx.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """One folder in the Hugging Face layout, released or converted to MLX; or a single file with another's config."""

    folder: Path
    config: Mapping[str, Any]
    file: Path | None = None  # where the tensors are, if not in the files that the folder's index names

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Raises CheckpointError for a folder that is missing or has no readable config.json."""
        try:
            if not folder.is_dir():
                raise CheckpointError(f"{folder} is not a folder; give the folder that holds config.json")
            if not (folder / "config.json").is_file():
                raise CheckpointError(f"{folder} has no config.json; give the folder of a model checkpoint")
        except OSError as error:
            raise CheckpointError(f"{str(folder)[:200]} cannot be opened: {error.strerror}") from error
        return cls(folder, read_json(folder / "config.json"))

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "(none)"))

    def eos_token_ids(self) -> list[int] | None:
        """Tokens that end a text: generation_config.json speaks first, as in mlx-lm."""
        generation = self.folder / "generation_config.json"
        places = [read_json(generation)] if generation.is_file() else []
        places += [dict(self.config), dict(self.config.get("text_config") or {})]
        for place in places:
            ids = place.get("eos_token_id")
            if ids is not None:
                found = ids if isinstance(ids, list) else [ids]
                if not all(isinstance(token, int) for token in found):
                    raise CheckpointError(f"{self.folder} has eos_token_id {ids!r}; expected token ids")
                return found
        return None

    @property
    def name(self) -> str:
        """What an error calls it."""
        return str(self.file or self.folder)

    def shards(self) -> list[Path]:
        """The weight files, each with a readable header and its full length."""
        if self.file is not None:
            _check_file(self.file)
            return [self.file]
        index = self.folder / INDEX
        content = read_json(index) if index.is_file() else None
        names = shard_names(content, [path.name for path in self.folder.glob("*.safetensors")], str(self.folder))
        for name in names:
            _check_file(self.folder / name)
        return [self.folder / name for name in names]

    def names(self) -> set[str]:
        """Every tensor's name, from the files' headers."""
        return {name for shard in self.shards() for name in read_header(shard).names}

    def check_sizes(self) -> None:
        """Refuse a config that calls for absurdly more than the files hold, before anything is built from it.

        What is plausible goes on, to be compared tensor by tensor. Raises CheckpointError.
        """
        shapes = [entry.shape for shard in self.shards() for entry in read_header(shard).tensors.values()]
        longest = max((max(shape, default=1) for shape in shapes), default=0)
        limits = dict.fromkeys(_SIZES, max(longest, 2**20)) | {"num_hidden_layers": max(len(shapes), 2**10)}
        text = self.config.get("text_config")
        # A ring of this length is allocated for every layer, and no tensor tells it.
        limits["sliding_window"] = _LONGEST_WINDOW
        for config in (self.config, text if isinstance(text, Mapping) else {}):
            for name, most in limits.items():
                value = config.get(name)
                if isinstance(value, int) and value > most:
                    raise CheckpointError(
                        f"{self.folder / 'config.json'} says {name} {value}, which is beyond the {len(shapes)} tensors "
                        f"of {self.name}, none longer than {longest}, or all reason; download it again, or leave it"
                    )

    def tensors(self) -> dict[str, mx.array]:
        """Every tensor by name, read lazily."""
        found: dict[str, mx.array] = {}
        for shard in self.shards():
            try:
                loaded = mx.load(str(shard))
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(f"MLX cannot read {shard}: {error}") from error
            assert isinstance(loaded, dict)
            found.update(loaded)
        return found

    def fill(
        self,
        model: nn.Module,
        sanitize: Callable[[Mapping[str, mx.array]], dict[str, mx.array]],
        dtype: mx.Dtype | None = None,
        exact: tuple[str, ...] = (),
    ) -> None:
        """Put the checkpoint's tensors into a model, quantising its modules as the checkpoint is, and read them.

        `dtype` recasts the floating-point ones, but those whose names end in one of `exact`. Raises CheckpointError
        for missing, unknown or misshapen tensors, and for a dtype that this machine cannot compute with.
        """
        self.lay(model, sanitize, dtype, exact)
        self._check_experts(model)
        self._read(model)

    def _read(self, model: nn.Module) -> None:
        """Have a model's weights in memory."""
        mx.eval(model.parameters())

    def lay(
        self,
        model: nn.Module,
        sanitize: Callable[[Mapping[str, mx.array]], dict[str, mx.array]],
        dtype: mx.Dtype | None = None,
        exact: tuple[str, ...] = (),
    ) -> None:
        """As `fill`, but nothing is read yet: the model holds promises of the right shapes."""
        quantization, tensors = self.quantization(), self.tensors()
        if dtype is not None:
            # Before anything is computed from them, so that it is computed in that precision.
            floats = (name for name, array in tensors.items() if mx.issubdtype(array.dtype, mx.floating))
            tensors |= {name: tensors[name].astype(dtype) for name in floats if not name.endswith(exact)}
        try:
            weights = sanitize(tensors)
        except ValueError as error:
            raise CheckpointError(f"{self.name} holds a tensor of an unexpected shape: {error}") from error
        quantise_like(model, weights, quantization, self.name)
        self._check_names(model, weights)
        model.load_weights(list(weights.items()))
        model.eval()

    def quantization(self) -> Mapping[str, Any] | None:
        """The quantisation of an MLX checkpoint. Raises CheckpointError for another toolkit's format."""
        ours = self.config.get("quantization")
        if ours is not None:
            return _object(ours, f"quantization in {self.folder}")
        given = self.config.get("quantization_config")
        if given is None:
            return None
        theirs = _object(given, f"quantization_config in {self.folder}")
        if "quant_method" in theirs:
            raise CheckpointError(
                f"{self.folder} is quantised with {theirs['quant_method']!r}; use an MLX conversion or the "
                "original bfloat16 checkpoint"
            )
        return theirs

    def _check_names(self, model: nn.Module, weights: Mapping[str, mx.array]) -> None:
        wanted: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
        if missing:
            raise CheckpointError(
                f"{self.name} lacks {_some(missing)} that its config calls for; download it again, or check "
                "that config.json belongs to these weights"
            )
        if unknown:
            raise CheckpointError(
                f"{self.name} has {_some(unknown)} that model_type {self.model_type!r} does not know; the "
                "config belongs to another model, or the format is newer than this program"
            )
        for name, array in weights.items():
            floats = [mx.issubdtype(a.dtype, mx.floating) for a in (array, wanted[name])]
            if floats[0] != floats[1]:
                raise CheckpointError(
                    f"{self.name}: {name} is {array.dtype}, expected {wanted[name].dtype}; if these weights are "
                    "quantised, use an MLX conversion"
                )
            if array.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{self.name}: {name} has shape {array.shape}, its config means {wanted[name].shape}"
                )

    def _check_experts(self, model: nn.Module) -> None:
        if mx.default_device() == mx.gpu:
            return
        for module in model.modules():
            if isinstance(module, SwitchLinear) and module.weight.dtype != mx.float32:
                raise CheckpointError(
                    f"{self.name} is a mixture of experts in {module.weight.dtype}, and MLX's CPU backend "
                    "multiplies experts in float32 only; use --dtype float32, or a quantised checkpoint"
                )


def quantise_like(
    model: nn.Module, weights: Mapping[str, mx.array], quantization: Mapping[str, Any] | None, name: str
) -> None:
    """Turn those modules into quantised ones for which the checkpoint has scales."""
    if not any(tensor.endswith(".scales") for tensor in weights):
        return
    default = {key: value for key, value in (quantization or {}).items() if key in ("group_size", "bits", "mode")}
    layers = {key: value for key, value in (quantization or {}).items() if isinstance(value, dict)}

    def choice(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights:
            return False
        for prefix in _WRAPPERS:
            # A layer's own entry stands alone, as in mlx-lm: what it leaves out is MLX's default, not the model's.
            if prefix + path in layers:
                return cast(dict[str, Any], layers[prefix + path])
        if f"{path}.biases" in weights:
            return _affine(module.weight.shape[-1], weights[f"{path}.weight"], weights[f"{path}.scales"])
        if not default:
            raise CheckpointError(f"{name} holds quantised tensors but its config.json has no quantization entry")
        return default

    try:
        nn.quantize(model, class_predicate=choice)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{name}: this MLX cannot read its quantisation {default}: {error}") from error


def _affine(width: int, packed: mx.array, scales: mx.array) -> dict[str, Any]:
    """The settings of an affine quantisation, as its shapes say: a sidecar's need not be those of the config."""
    return {"group_size": width // scales.shape[-1], "bits": 32 * packed.shape[-1] // width, "mode": "affine"}


_LONGEST_WINDOW = 2**16  # tokens; models that are known have up to 4096
_WRAPPERS = ("", "language_model.", "mtp.", "language_model.mtp.")
# Entries of a config that are, or divide, the length of some tensor, quantised or not.
_SIZES = (
    "hidden_size",
    "backbone_hidden_size",
    "intermediate_size",
    "vocab_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
)


def shard_names(index: Mapping[str, Any] | None, present: Collection[str], where: str) -> list[str]:
    """The weight files of a checkpoint: those its index names; without one model.safetensors, or model*.safetensors.

    `present` are the names beside the config. What else lies there, a head perhaps, is a file of its own. Raises
    CheckpointError for an index that names anything but safetensors beside it, and where there is nothing to read.
    """
    if index is not None:
        named = _object(index.get("weight_map"), f"weight_map of {where}/{INDEX}").values()
        if not all(isinstance(name, str) and name.endswith(".safetensors") for name in named):
            raise CheckpointError(f"{where}/{INDEX} names weight files that are not safetensors; only those are read")
        names = sorted(set(named))
        for name in names:
            if not _PLAIN_NAME.fullmatch(name):
                raise CheckpointError(f"{where}/{INDEX} names the shard {name!r}, which is outside the folder; refused")
    elif "model.safetensors" in present:
        names = ["model.safetensors"]
    else:
        names = sorted(fnmatch.filter(present, "model*.safetensors"))
    if not names:
        raise CheckpointError(f"{where} has no model*.safetensors file; only safetensors are read")
    return names


# No separators of any system, no drives, no control characters; the hub allows no stranger names either.
_PLAIN_NAME = re.compile(r"[^/\\:\x00-\x1f]+")


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file."""

    dtype: str  # as the format writes it: "BF16", "U32"
    shape: tuple[int, ...]
    begin: int  # its bytes in the file, end excluded
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: Mapping[str, TensorEntry]
    format: str | None  # "pt", "mlx"; many writers leave it out

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    @classmethod
    def parse(cls, length: bytes, text: bytes, size: int | None = None) -> "Header":
        """From the first eight bytes of a file and the JSON after them; `size` is the whole file's, where it is known.

        Raises ValueError where a name stands twice, a tensor's bytes are not as many as its shape means, or they
        overlap or leave gaps, within the file and without.
        """
        origin = 8 + int.from_bytes(length, "little")
        if origin != 8 + len(text):
            raise ValueError(f"a header of {len(text)} bytes, said to have {origin - 8}")
        try:
            content = json.loads(text, object_pairs_hook=_unique)
        except RecursionError:
            raise ValueError("a header nested too deeply") from None
        if not isinstance(content, dict):
            raise ValueError("a header that is no object")
        metadata = content.pop("__metadata__", None) or {}
        tensors = {name: _entry(name, entry, origin) for name, entry in content.items()}
        end = origin
        for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if entry.begin != end:
                raise ValueError(f"{name} begins at byte {entry.begin}, where {end} was expected")
            end = entry.end
        if size is not None and end != size:
            raise ValueError(f"tensors up to byte {end} in a file of {size} bytes")
        return cls(tensors, metadata.get("format") if isinstance(metadata, dict) else None)


def header_length(start: bytes, size: int) -> int:
    """How long the JSON after the first eight bytes of a file is. Raises ValueError for what cannot be."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    return length


def _entry(name: str, entry: Any, origin: int) -> TensorEntry:
    """Raises ValueError where the number of bytes is not that of the shape."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{name} has sizes that are no sizes")
        if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
            raise ValueError(f"{name} has {end - begin} bytes for {dtype} of shape {shape}")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} is described as {str(entry)[:80]}") from error
    return TensorEntry(dtype, shape, origin + begin, origin + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that stands twice")
    return found


_LONGEST_HEADER = 100_000_000  # the format's own limit
_BITS = {"BOOL": 8, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BF16": 16, "F16": 16, "F32": 32, "F64": 64}
_BITS |= {f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)}
_BITS |= {f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}


def read_header(path: Path) -> Header:
    """The header of one weight file. Raises CheckpointError for a file that is damaged or cannot be read."""
    _check_file(path)  # safetensors too has checked it then
    try:
        with path.open("rb") as file:
            size, start = path.stat().st_size, file.read(8)
            return Header.parse(start, file.read(header_length(start, size)), size)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is not there or no file, though the checkpoint needs it; download it again")
    try:
        with path.open("rb"), safe_open(path, framework="numpy"):
            pass
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read: {error.strerror}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    return _object(content, str(path))


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of the text model: its `text_config`, or all of it where there is none."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, expected an object")
    return value


def _some(names: list[str]) -> str:
    """'3 tensors (a, b, ...)'."""
    shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
