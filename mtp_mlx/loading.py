"""From a name to a pair: folder or hub id -> target, drafter and tokenizer, checked against each other.

The only module that knows architectures by name. A new one is a file in models/ and a line in a table here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mtp_mlx.checkpoint import Checkpoint
from mtp_mlx.errors import CheckpointError, PairError, RequestError
from mtp_mlx.models import gemma4, gemma4_assistant
from mtp_mlx.ngram import NoDrafter
from mtp_mlx.types import Drafter, Pair

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
ASSISTANT_FOLDER = "assistant"  # a folder that holds a pair keeps the drafter here

Built = TypeVar("Built")

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]


@dataclass(frozen=True)
class Loaded:
    """A pair ready to run, and where its parts came from."""

    pair: Pair
    tokenizer: TokenizerWrapper
    target: str
    drafter: str | None
    drafter_reason: str  # why this drafter, or why none


def _gemma4_target(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> gemma4.Model:
    model = _built(lambda config: gemma4.Model(gemma4.TextConfig.from_dict(config)), checkpoint)
    checkpoint.fill(model, model.sanitize, dtype)
    return model


def _gemma4_drafter(checkpoint: Checkpoint, dtype: mx.Dtype | None, target: gemma4.Model) -> Drafter:
    config = _built(gemma4_assistant.Config.from_dict, checkpoint)
    found = gemma4_assistant.mismatches(config, target.config)
    if found:
        raise PairError(
            f"the drafter in {checkpoint.folder} was made for another target: it expects {'; '.join(found)}; "
            "use the assistant released for this target, or --drafter none"
        )
    network = _built(lambda _: gemma4_assistant.Model(config), checkpoint)
    checkpoint.fill(network, network.sanitize, dtype)
    if config.use_ordered_embeddings:
        _built(lambda _: gemma4_assistant.check_ordering(network.masked_embedding.token_ordering), checkpoint)
    return gemma4_assistant.Assistant(network, target)


_TARGETS: dict[str, Callable[[Checkpoint, mx.Dtype | None], gemma4.Model]] = {
    "gemma4": _gemma4_target,
    "gemma4_text": _gemma4_target,
    "gemma4_unified": _gemma4_target,
    "gemma4_unified_text": _gemma4_target,
}
_DRAFTERS: dict[str, Callable[[Checkpoint, mx.Dtype | None, gemma4.Model], Drafter]] = {
    "gemma4_assistant": _gemma4_drafter,
    "gemma4_unified_assistant": _gemma4_drafter,
}


def load(
    model: str | Path = DEMO, drafter: str | Path | None = "auto", *, dtype: mx.Dtype | None = None
) -> tuple[Pair, TokenizerWrapper]:
    """Load a target with its drafter, and the tokenizer.

    `model` is a folder, a hub id or "demo". `drafter` is a folder, a hub id, "auto" for the one that belongs
    to the target, or None (or "none") for plain decoding. `dtype` recasts the weights that are not quantised;
    None keeps the checkpoint's.

    Raises CheckpointError for a checkpoint that cannot be read, PairError for a drafter made for another target.
    """
    loaded = load_pair(str(model), None if drafter is None else str(drafter), dtype)
    return loaded.pair, loaded.tokenizer


def load_pair(model: str = DEMO, drafter: str | None = "auto", dtype: mx.Dtype | None = None) -> Loaded:
    """As `load`, with the names of both parts and the reason for the choice of drafter."""
    if dtype is not None and not mx.issubdtype(dtype, mx.floating):
        raise RequestError(f"weights cannot be {dtype}; give a floating-point type such as mx.float32")
    folder = find(model)
    checkpoint = Checkpoint.open(folder)
    build = _TARGETS.get(checkpoint.model_type)
    if build is None:
        raise CheckpointError(_unknown_target(checkpoint))
    chosen, reason = choose_drafter(model, folder, drafter)
    # Before the target, which may take minutes: a mistyped drafter should be known at once.
    build_drafter = None if chosen is None else _drafter_builder(find(chosen))
    target = build(checkpoint, dtype)
    assistant: Drafter = NoDrafter() if build_drafter is None else build_drafter(dtype, target)
    return Loaded(Pair(target, assistant), _tokenizer(checkpoint), model, chosen, reason)


def choose_drafter(model: str, folder: Path, drafter: str | None) -> tuple[str | None, str]:
    """Which drafter to load for a target, if any, and why."""
    if drafter is None or drafter == "none":
        return None, "drafter turned off"
    if drafter != "auto":
        return drafter, "named by the caller"
    inside = folder / ASSISTANT_FOLDER
    if inside.is_dir():
        return str(inside), "lies in the target's folder"
    if not Path(model).exists() and model.startswith("google/gemma-4-") and model.endswith("-it"):
        return f"{model}-assistant", "released together with the target"
    return None, f"no drafter is known for {model}: plain decoding; name one with --drafter"


def find(name: str) -> Path:
    """The folder of a model given as folder, hub id or "demo"; what is not on disk yet is downloaded."""
    if name == DEMO:
        return DEMO_FOLDER
    if not name:
        raise CheckpointError("the name of a model is empty; give a folder, a hub id or 'demo'")
    if not _is_hub_id(name) or Path(name).exists():
        return Path(name).expanduser()
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a model that the hub would give ({_first_line(error)}); check "
            "the name, your connection and, for a gated model, that you are logged in"
        ) from error


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))


def _drafter_builder(folder: Path) -> Callable[[mx.Dtype | None, gemma4.Model], Drafter]:
    checkpoint = Checkpoint.open(folder)
    build = _DRAFTERS.get(checkpoint.model_type)
    if build is None:
        raise PairError(
            f"{folder} has model_type {checkpoint.model_type!r}, which is not a drafter; known drafters: "
            f"{', '.join(sorted(_DRAFTERS))}"
        )
    return partial(build, checkpoint)


def _unknown_target(checkpoint: Checkpoint) -> str:
    if checkpoint.model_type in _DRAFTERS:
        return f"{checkpoint.folder} is a drafter; give its target with --model and this folder with --drafter"
    return (
        f"{checkpoint.folder} has model_type {checkpoint.model_type!r}; supported targets: "
        f"{', '.join(sorted(_TARGETS))}"
    )


def _built(build: Callable[[Mapping[str, Any]], Built], checkpoint: Checkpoint) -> Built:
    """What `build` makes of a checkpoint's config. Raises CheckpointError where the config makes no sense."""
    try:
        return build(checkpoint.config)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'} lacks the entry {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{checkpoint.folder} cannot be used: {error}") from error


def _tokenizer(checkpoint: Checkpoint) -> TokenizerWrapper:
    if not (checkpoint.folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{checkpoint.folder} has no tokenizer.json; download the whole checkpoint")
    # The limit is ours to check, against the model's context; transformers would only warn, on stderr.
    limits = {"model_max_length": 2**40}
    eos = checkpoint.eos_token_ids()
    try:
        tokenizer: TokenizerWrapper = load_tokenizer(checkpoint.folder, limits, eos_token_ids=eos)
    except Exception as error:  # tokenizers raises bare Exceptions, transformers nearly anything
        raise CheckpointError(f"the tokenizer in {checkpoint.folder} cannot be read: {_first_line(error)}") from error
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
