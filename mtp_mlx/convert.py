"""An original checkpoint as an MLX one that keeps its drafter: the target by mlx-lm, the drafter beside it.

mlx-lm loads the result and leaves the drafter alone; here both are found. Everything is written into
`<output>.partial`, which takes the name of the output when it is complete.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model

from mtp_mlx.checkpoint import INDEX, Checkpoint, read_header, read_json
from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.extract import check_fits, extract, open_head, open_source
from mtp_mlx.hub import TENSORS, find, first_line
from mtp_mlx.loading import (
    check_drafter_folder,
    first_found,
    for_mlx_lm,
    has_own_head,
    open_target,
    sidecar_name,
)
from mtp_mlx.pairs import ASSISTANT_FOLDER, choose
from mtp_mlx.quantise import BITS, DRAFTER_BITS, GROUP_SIZES, Affine, is_router, quantised

MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # default group size and bits
RECIPES = tuple(QUANT_RECIPES)
_EXACT = ("A_log",)  # a decay in the exponent of an exponent: never recast
_NOTES = "convert.json"  # in the partial folder: what it is to become, and what is finished
_COPIED = (".json", ".jinja", ".model", ".txt")  # of the tokenizer and of how to generate

_log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Precision:
    """What becomes of the target's weights."""

    bits: int | None  # None: they are not quantised
    group_size: int
    mode: str = "affine"
    recipe: str | None = None  # one of mlx-lm's, with more bits where they count
    dtype: mx.Dtype | None = None  # of what is not quantised; None keeps the original's

    @classmethod
    def choose(
        cls, bits: int | str | None, group_size: int | None, mode: str, recipe: str | None, dtype: mx.Dtype | None
    ) -> "Precision":
        """From what was asked for: bits None means those that go with the mode, "none" no quantisation.

        Raises RequestError for settings that do not go together or that MLX has no kernels for.
        """
        if mode not in MODES:
            raise RequestError(f"--mode {mode} is not one of {', '.join(MODES)}")
        if recipe is not None:
            return cls._mixed(bits, group_size, mode, recipe, dtype)
        if bits == "none":
            if mode != "affine" or group_size is not None:
                raise RequestError("--bits none quantises nothing; leave out --mode and --group-size")
            return cls(None, MODES[mode][0], mode, None, dtype)
        size, usual = MODES[mode]
        chosen, group = usual if bits is None else bits, size if group_size is None else group_size
        if mode == "affine":
            Affine(cast(int, chosen), group)
        elif (chosen, group) != (usual, size):
            raise RequestError(f"{mode} means {usual} bits in groups of {size}; leave out --bits and --group-size")
        return cls(cast(int, chosen), group, mode, None, dtype)

    @classmethod
    def _mixed(
        cls, bits: int | str | None, group_size: int | None, mode: str, recipe: str, dtype: mx.Dtype | None
    ) -> "Precision":
        if recipe not in RECIPES:
            raise RequestError(f"--recipe {recipe} is not one of {', '.join(RECIPES)}")
        if bits is not None or mode != "affine":
            raise RequestError(f"--recipe {recipe} says how many bits; leave out --bits and --mode")
        group = MODES[mode][0] if group_size is None else group_size
        if group not in GROUP_SIZES:
            raise RequestError(
                f"a group size of {group} is not possible; give one of {', '.join(map(str, GROUP_SIZES))}"
            )
        low = next(bits for bits in BITS if f"mixed_{bits}_" in recipe)
        return cls(low, group, mode, recipe, dtype)

    def of_drafter(self, bits: str) -> Affine | None:
        """What becomes of a drafter's weights: "auto" goes with the target, with 4 bits at least."""
        if bits == "none" or (bits == "auto" and self.bits is None):
            return None
        if bits != "auto" and bits not in map(str, DRAFTER_BITS):
            raise RequestError(f"--drafter-bits {bits} is not one of auto, {', '.join(map(str, DRAFTER_BITS))}, none")
        chosen = (8 if self.bits == 8 else 4) if bits == "auto" else int(bits)
        return Affine(chosen, self.group_size if self.group_size in GROUP_SIZES else 64)


class Converted(NamedTuple):
    """What was written, and what it was made from."""

    folder: Path
    bits_per_weight: float  # of the target
    before: int  # bytes of the original's weights
    target: int
    drafter: int | None  # bytes, None without one
    drafter_reason: str


class _Task(NamedTuple):
    """What is to be done, all of it checked."""

    source: str
    original: Checkpoint
    drafter: str | None  # folder, file or hub id
    precision: Precision
    of_drafter: Affine | None

    @property
    def key(self) -> dict[str, Any]:
        """What a partial folder must have been made for to be continued."""
        shards = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in self.original.shards()]
        said = (str(self.original.folder.resolve()), shards, self.drafter, str(self.precision), str(self.of_drafter))
        return {"made from": json.loads(json.dumps(said))}


def convert(
    source: str,
    output: Path,
    precision: Precision,
    *,
    drafter: str = "auto",
    drafter_bits: str = "auto",
    force: bool = False,
    say: Say = lambda doing: None,
) -> Converted:
    """Convert a checkpoint (folder or hub id) and its drafter into one folder.

    Raises CheckpointError for a source that cannot be converted and a disk that is full, PairError for a drafter of
    another target, RequestError for an output that is in the way.
    """
    of_drafter, output = precision.of_drafter(drafter_bits), output.absolute()
    _check_output(output, force)
    original = open_target(find(source, open_target))
    _check_source(original, output)
    choice = choose(source, original, drafter)
    # Of one that was named, a Qwen original perhaps, no more may be needed than its head.
    chosen = choice.drafters[0] if choice.own else first_found(choice)
    task = _Task(source, original, chosen, precision, of_drafter)
    _check_drafter(task)
    _check_space(task, output)
    work = output.with_name(output.name + ".partial")
    try:
        _write(task, work, say)
        (work / _NOTES).unlink()
        _put_in_place(work, output)
    except (OSError, RuntimeError) as error:  # MLX raises the latter for a disk that is full
        raise CheckpointError(
            f"{output} cannot be written: {first_line(error)}; what is done lies in {work}"
        ) from error
    return _report(task, output, choice.reason)


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise RequestError(f"{output} is there already; give another OUTPUT, or --force to replace it")
    if output.samefile(Path.cwd()):
        raise RequestError(f"{output} is the folder that you are in, which cannot be replaced; go elsewhere first")
    if not (output / "config.json").is_file():
        raise RequestError(f"{output} is no model folder, so --force does not replace it; give another OUTPUT")


def _check_source(original: Checkpoint, output: Path) -> None:
    original.check_sizes()
    if output.resolve() in (original.folder.resolve(), *original.folder.resolve().parents):
        raise RequestError(f"{output} holds the original; give another OUTPUT")
    found = original.config.get("quantization") or original.config.get("quantization_config")
    if found:
        kind = found.get("quant_method") or found.get("mode", "affine") if isinstance(found, Mapping) else found
        raise CheckpointError(
            f"{original.folder} is quantised already ({kind}); convert the original, in bfloat16 or float16"
        )
    kinds = {entry.dtype for shard in original.shards() for entry in read_header(shard).tensors.values()}
    small = sorted(kind for kind in kinds if kind.startswith(("F8", "F4", "U8", "U32")))
    if small:
        raise CheckpointError(
            f"{original.folder} holds tensors of type {small[0]}, so it is quantised already; convert the original, "
            "in bfloat16 or float16"
        )


def _check_drafter(task: _Task) -> None:
    """Before the target, which may take long."""
    if task.drafter is None:
        return
    if _is_folder_of_its_own(task, task.drafter):
        check_drafter_folder(find(task.drafter), task.original)
        return
    source, _ = open_head(task.drafter)
    if "config.json" in source.files:
        check_fits(source.json("config.json"), task.drafter, task.original)


def _is_folder_of_its_own(task: _Task, drafter: str) -> bool:
    """Whether a drafter is a checkpoint by itself, with a config, and not a part of a target or a single file."""
    if not has_own_head(task.original.config):
        return True
    source, file, _ = open_source(drafter)
    return file is None and "config.json" in source.files and not has_own_head(source.json("config.json"))


def _check_space(task: _Task, output: Path) -> None:
    place = next(folder for folder in output.absolute().parents if folder.is_dir())
    have, bits = shutil.disk_usage(place).free, task.precision.bits or 16
    need = _weights(task.original) * bits // 16
    if need > have:
        raise CheckpointError(
            f"{place} has {have / 1e9:.1f} GB free, the converted weights need about {need / 1e9:.1f} GB; make room"
        )


def _weights(checkpoint: Checkpoint) -> int:
    return sum(shard.stat().st_size for shard in checkpoint.shards())


def _write(task: _Task, work: Path, say: Say) -> None:
    """All parts, leaving out what an interrupted attempt at the same has finished."""
    notes, finished = work / _NOTES, task.key | {"target": True}
    if notes.is_file() and read_json(notes) == finished:
        _log.warning("%s holds the converted target from an earlier attempt; going on from there", work)
    else:
        _clear(work)
        notes.write_text(json.dumps(task.key | {"target": False}))
        say("converting the target")
        _write_target(task, work)
        _copy_rest(task.original.folder, work)
        notes.write_text(json.dumps(finished))
    if task.drafter is not None:
        say("converting the drafter")
        _write_drafter(task, task.drafter, work)


def _clear(work: Path) -> None:
    """An empty folder to work in. Raises RequestError for one that is there and no earlier attempt of ours."""
    if work.exists():
        if not (work / _NOTES).is_file():
            raise RequestError(f"{work} is there already, where the conversion is to be written; move it away")
        _log.warning("%s is left from another attempt; starting anew", work)
        shutil.rmtree(work)
    work.mkdir(parents=True)


def _write_target(task: _Task, work: Path) -> None:
    how = task.precision
    model, config = _loaded(task.original, how.dtype)
    if how.bits is not None:
        with redirect_stdout(StringIO()):  # it prints what the report says
            model, config = quantize_model(
                model, config, how.group_size, how.bits, mode=how.mode, quant_predicate=_recipe(how, model)
            )
    save_model(work, model, donate_model=True)  # computed shard by shard, as it is written
    save_config(config, work / "config.json")


def _loaded(original: Checkpoint, dtype: mx.Dtype | None) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model, lazily. Recast before anything is computed, so that it is computed in that precision."""

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        model, arguments = _get_classes(config)

        class Recast(model):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, mx.array]) -> Any:
                return super().sanitize(weights if dtype is None else recast(weights, dtype))

        return Recast, arguments

    try:
        model, config = load_model(
            original.folder, lazy=True, model_config=for_mlx_lm(original), get_model_classes=classes
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"mlx-lm cannot load {original.folder}: {first_line(error)}") from error
    return model, config


def recast(tensors: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Floating-point tensors in another precision, lazily."""
    return {
        name: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) and not name.endswith(_EXACT) else array
        for name, array in tensors.items()
    }


def _recipe(how: Precision, model: nn.Module) -> Callable[[str, nn.Module], bool | dict[str, Any]] | None:
    """mlx-lm's mixture; but it gives routers few bits as well, which no other of its quantisations does."""
    if how.recipe is None:
        return None
    built: Any = mixed_quant_predicate_builder(how.recipe, model, how.group_size)
    mixture: Callable[[str, nn.Module], bool | dict[str, Any]] = built

    def choice(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if is_router(f"{path}.weight"):
            return {"group_size": how.group_size, "bits": 8, "mode": "affine"}
        return mixture(path, module)

    return choice


def _copy_rest(folder: Path, work: Path) -> None:
    for file in sorted(folder.iterdir()):
        weights = file.name.endswith(TENSORS + ".index.json")
        if file.is_file() and file.suffix in _COPIED and file.name != "config.json" and not weights:
            shutil.copyfile(file, work / file.name)  # a link of the hub's cache becomes a file


def _write_drafter(task: _Task, drafter: str, work: Path) -> None:
    if _is_folder_of_its_own(task, drafter):
        original, folder = Checkpoint.open(find(drafter)), work / ASSISTANT_FOLDER
        _write_assistant(original, folder, task.precision.dtype, task.of_drafter)
        _copy_rest(original.folder, folder)  # a smaller model that drafts is asked for its tokens
    else:
        extract(drafter, work, how=task.of_drafter, force=True)


def _write_assistant(original: Checkpoint, folder: Path, dtype: mx.Dtype | None, how: Affine | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors, config = original.tensors(), dict(original.config)
    packed = original.quantization() is not None  # then it is taken as it is
    if dtype is not None and not packed:
        tensors = recast(tensors, dtype)
    if how is not None and not packed:
        tensors = quantised(tensors, how, str(original.folder))
        config |= {"quantization": how.entry(), "quantization_config": how.entry()}
    form = read_header(original.shards()[0]).format or "mlx"  # of a head it may tell how norms are stored
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": form})
    (folder / "config.json").write_text(json.dumps(config, indent=4))


def _put_in_place(work: Path, output: Path) -> None:
    if not output.exists():
        work.rename(output)
        return
    old = Path(mkdtemp(prefix=output.name + ".replaced-", dir=output.parent))
    output.rename(old / output.name)
    work.rename(output)
    shutil.rmtree(old)


def _report(task: _Task, output: Path, reason: str) -> Converted:
    counted = read_json(output / INDEX)["metadata"]  # mlx-lm counts what it writes
    files = [output / sidecar_name(task.original.config), *(output / ASSISTANT_FOLDER).glob("*" + TENSORS)]
    drafter = None if task.drafter is None else sum(file.stat().st_size for file in files if file.is_file())
    return Converted(
        output,
        8 * counted["total_size"] / counted["total_parameters"],
        _weights(task.original),
        counted["total_size"],
        drafter,
        reason,
    )
