"""Which drafter belongs to a target, and why. What is published is data, in pairs.toml; here are the rules.

A drafter in the target's own folder comes first, then what the target's name says, then what its folder says it was
made from, then its shape.
"""

import logging
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from mtp_mlx.checkpoint import Checkpoint, read_header, read_json, text_part
from mtp_mlx.errors import CheckpointError
from mtp_mlx.hub import first_line, is_hub_id
from mtp_mlx.models.base import is_head

ASSISTANT_FOLDER = "assistant"  # a folder that holds a pair keeps the drafter here
LOOKUP = "drafts are copied from earlier text only (prompt lookup)"
HOW_TO_GET_A_HEAD = (
    "conversions often drop the tensors mtp.*; the original repository has them, and `mtp-mlx extract {}` fetches them "
    "alone. Put one beside the weights as model-mtp.safetensors, or name the file or its folder with --drafter"
)
_SIDECARS = ("*.safetensors", "mtp/*.safetensors", "optiq/*.safetensors")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The drafters that may be used with a target, and why."""

    drafters: tuple[str, ...]  # folders, files or ids: the one to use, then those that would do; empty: none
    reason: str
    own: bool = False  # named by the user or a part of the target: one that cannot be used is an error then


@dataclass(frozen=True)
class Family:
    """A released model, and the drafters published for it and its conversions."""

    name: str  # as in the names of its repositories, without organisation and form
    original: str
    shape: Mapping[str, int]  # entries of its config; empty where they are not known
    seen: tuple[str, ...]
    by_rule: tuple[str, ...]
    qat_seen: tuple[str, ...]
    qat_by_rule: tuple[str, ...]
    carries_head: bool  # the original is released with its drafter inside

    def drafters(self, trained_quantised: bool) -> tuple[str, ...]:
        """All that fit, those made for such a target first, and of these the ones that were seen."""
        ordinary = self.seen + self.by_rule
        return (self.qat_seen + self.qat_by_rule + ordinary) if trained_quantised else ordinary


@dataclass(frozen=True)
class Registry:
    families: tuple[Family, ...]
    organisations: frozenset[str]
    forms: frozenset[str]
    trained_quantised: str
    headed: frozenset[str]

    def family(self, name: str) -> Family | None:
        """The family that an id belongs to, by its name alone."""
        organisation, _, repository = name.lower().partition("/")
        if organisation not in self.organisations:
            return None
        for family in self.families:
            rest = repository.removeprefix(family.name.lower())
            if rest != repository and set(rest.split("-")[1:]) <= self.forms and rest[:1] in ("", "-"):
                return family
        return None

    def like(self, config: Mapping[str, Any]) -> tuple[Family, ...]:
        """The families with the shape of a config."""
        entries = text_part(config)
        known = [family for family in self.families if family.shape]
        return tuple(f for f in known if all(entries.get(name) == value for name, value in f.shape.items()))


@cache
def registry() -> Registry:
    """What pairs.toml says."""
    with (Path(__file__).parent / "pairs.toml").open("rb") as file:
        content = tomllib.load(file)
    lists = ("seen", "by_rule", "qat_seen", "qat_by_rule")
    families = (
        Family(
            entry["name"],
            entry["original"],
            entry.get("shape", {}),
            **{name: tuple(entry.get(name, ())) for name in lists},
            carries_head=entry.get("carries_head", False),
        )
        for entry in content["families"]
    )
    return Registry(
        tuple(families),
        frozenset(name.lower() for name in content["organisations"]),
        frozenset(content["forms"]),
        content["trained_quantised"],
        frozenset(content["headed"]),
    )


def choose_drafter(model: str, checkpoint: Checkpoint, drafter: str | None) -> tuple[str | None, str]:
    """Which drafter to load for a target, if any, and why."""
    choice = choose(model, checkpoint, drafter)
    return (choice.drafters[0] if choice.drafters else None), choice.reason


def choose(model: str, checkpoint: Checkpoint, drafter: str | None) -> Choice:
    """The drafters for a target. `model` is what the user called it, `drafter` is "auto", "none" or a name."""
    if drafter is None or drafter == "none":
        return Choice((), "drafter turned off")
    if drafter != "auto":
        return Choice((drafter,), "named by the caller", own=True)
    headed = checkpoint.model_type in registry().headed
    inside = _inside(checkpoint, headed) if checkpoint.folder.is_dir() else None
    if inside is not None:
        return inside
    named = _by_name(model, checkpoint) or _by_shape(checkpoint)
    if named is not None and named.drafters:
        return named
    if headed:
        return _headless(model, checkpoint, named)
    return named or Choice((), f"no drafter is known for {model}: {LOOKUP}; name one with --drafter")


def _inside(checkpoint: Checkpoint, headed: bool) -> Choice | None:
    """A drafter in the target's own folder."""
    folder = checkpoint.folder / ASSISTANT_FOLDER
    if (folder / "config.json").is_file():
        return Choice((str(folder.absolute()),), "lies in the target's folder", own=True)
    if not headed:
        return None
    if is_head(checkpoint.names()):
        return Choice((str(checkpoint.folder.absolute()),), "the mtp head inside the checkpoint", own=True)
    beside = sidecar(checkpoint)
    if beside is None:
        return None
    return Choice((str(beside.absolute()),), "an mtp head that lies beside the checkpoint's own files", own=True)


def sidecar(checkpoint: Checkpoint) -> Path | None:
    """The file beside a checkpoint's own that holds an mtp head, if those do not."""
    if is_head(checkpoint.names()):
        return None
    own = set(checkpoint.shards())
    found = sorted(file for place in _SIDECARS for file in checkpoint.folder.glob(place) if file.is_file())
    return next((file for file in found if file not in own and holds_head(file)), None)


def holds_head(file: Path) -> bool:
    """Whether a weight file has an mtp head in it; one that cannot be read has none."""
    try:
        return is_head(read_header(file).names)
    except CheckpointError as error:
        _log.warning("%s", error)  # nobody has asked for this file
        return False


def _by_name(model: str, checkpoint: Checkpoint) -> Choice | None:
    """By the id of the target, or by what it was made from."""
    for name, source in _names(model, checkpoint):
        family = registry().family(name)
        if family is not None:
            return _of(family, name, checkpoint, source)
    return None


def _names(model: str, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Ids that a target goes by, and how each is known."""
    own = id_of(model)
    if own is not None:
        family = registry().family(own)
        itself = family is not None and family.original.lower() == own.lower() and family.drafters(False)
        yield own, "published for {}" if itself else f"{own} is a form of {{}}"
    for base in _bases(checkpoint.folder / "README.md"):
        yield base, f"its model card says it was made from {base}, a form of {{}}"
    entries = [("config.json", "_name_or_path", dict(checkpoint.config))]
    adapter = _object(checkpoint.folder / "adapter_config.json")
    entries += [("adapter_config.json", key, adapter) for key in ("base_model_name_or_path", "model")]
    for file, key, content in entries:
        given = content.get(key)
        name = id_of(given) if isinstance(given, str) else None
        if name is not None:
            yield name, f"{key} in its {file} is {given}, a form of {{}}"


def id_of(model: str) -> str | None:
    """The hub id that a name stands for: an id itself, a folder in the hub's cache, or one called like an id.

    Programs keep models in folders `organisation/name`. None for a name that tells nothing.
    """
    if is_hub_id(model):
        return model  # a folder of that name as well
    path = Path(model).expanduser()
    for part in reversed(path.parts):
        cached = re.fullmatch(r"models--([^/]+?)--([^/]+)", part)
        if cached:
            return f"{cached[1]}/{cached[2]}"
    *_, organisation, name = "", "", *path.parts
    return f"{organisation}/{name}" if organisation and name else None


def _bases(card: Path) -> list[str]:
    """What the front matter of a model card names as `base_model`."""
    try:
        content: Any = metadata_load(card) if card.is_file() else None
    except Exception as error:  # YAML has errors of its own, and a card may say anything
        _log.info("the model card %s cannot be read: %s", card, first_line(error))
        return []
    given = content.get("base_model") if isinstance(content, dict) else None
    bases = given if isinstance(given, list) else [given]
    return [base for base in bases if isinstance(base, str)]


def _object(path: Path) -> dict[str, Any]:
    """A JSON file that need not be there, nor make sense."""
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError as error:
        _log.info("%s", error)
        return {}


def _by_shape(checkpoint: Checkpoint) -> Choice | None:
    """By the numbers in its config, which a fine-tune keeps. A shape that families share decides nothing."""
    found = registry().like(checkpoint.config)
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(family.original for family in found)
        return Choice((), f"its shape is that of {names}, so it tells no drafter")
    shape = ", ".join(f"{name} {value}" for name, value in found[0].shape.items())
    return _of(found[0], "", checkpoint, f"its shape is that of {{}} ({shape})")


def _of(family: Family, name: str, checkpoint: Checkpoint, source: str) -> Choice:
    """The drafters of a family in the order in which to try them: of the target's organisation, of its precision."""
    organisation, _, repository = name.lower().partition("/")
    drafters = family.drafters(registry().trained_quantised in repository.split("-"))
    made_for = drafters[: len(drafters) - len(family.drafters(False))]  # those for a target like this one
    precision = _precision(checkpoint)

    def rank(drafter: str) -> tuple[bool, ...]:
        theirs, _, form = drafter.lower().partition("/")
        guessed = drafter in family.by_rule + family.qat_by_rule
        rest = (theirs != organisation, not form.endswith(f"-{precision}"))
        return (bool(made_for) and drafter not in made_for, guessed, *rest)

    ranked = tuple(sorted(drafters, key=rank))
    return Choice(ranked, source.format(family.original))


def _precision(checkpoint: Checkpoint) -> str:
    """As the names of conversions say it: "4bit", "mxfp8", "bf16"."""
    given = checkpoint.config.get("quantization")
    if not isinstance(given, Mapping):
        return "bf16"
    mode = given.get("mode", "affine")
    return f"{given.get('bits')}bit" if mode == "affine" else str(mode)


def _headless(model: str, checkpoint: Checkpoint, named: Choice | None) -> Choice:
    """No head, though targets of this type are released with one."""
    text = checkpoint.config.get("text_config") or checkpoint.config
    promised = "its config.json promises an mtp head, but no file" if text.get("mtp_num_hidden_layers") else "no file"
    names = (registry().family(name) for name, _ in _names(model, checkpoint))
    original = next((family.original for family in names if family is not None), "ORIGINAL")
    known = f" ({named.reason})" if named is not None else ""
    how = HOW_TO_GET_A_HEAD.format(original)
    return Choice((), f"{promised} in {checkpoint.folder} holds one{known}: {LOOKUP}; {how}")
