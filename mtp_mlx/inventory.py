"""What the local cache of the hub holds that can be run."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CacheNotFound, constants, scan_cache_dir

from mtp_mlx.checkpoint import Checkpoint
from mtp_mlx.errors import CheckpointError
from mtp_mlx.hub import Snapshot
from mtp_mlx.loading import choose_drafter, role


@dataclass(frozen=True)
class Model:
    """One repository of the cache."""

    name: str  # its hub id
    role: str  # "target" or "drafter"
    model_type: str
    folder: Path
    nbytes: int  # of the files that are read and here
    missing: tuple[str, ...]  # files that are read and not here, or what is wrong with the repository
    drafter: str | None
    drafter_reason: str


def models() -> list[Model]:
    """Targets, then drafters, by name. Raises CheckpointError for a cache that cannot be read."""
    try:
        held = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{constants.HF_HUB_CACHE} cannot be read as a cache of the hub: {error}") from error
    found = [_model(repo.repo_id) for repo in held if repo.repo_type == "model"]
    return sorted((model for model in found if model), key=lambda model: (model.role == "drafter", model.name.lower()))


def _model(name: str) -> Model | None:
    """None for a repository of something else."""
    snapshot = Snapshot.held(name)
    if snapshot is None:
        return None
    try:
        checkpoint = Checkpoint.open(snapshot.folder)
    except CheckpointError:
        return None
    kind = role(checkpoint.model_type)
    if kind is None:
        return None
    sizes, missing = _state(snapshot)
    drafter, reason = _drafter(name, checkpoint) if kind == "target" and not missing else (None, "")
    return Model(name, kind, checkpoint.model_type, snapshot.folder, sizes, missing, drafter, reason)


def _state(snapshot: Snapshot) -> tuple[int, tuple[str, ...]]:
    """How large what is here is, and what is missing."""
    try:
        needed, missing = snapshot.needed(), tuple(snapshot.missing())
    except CheckpointError as error:
        needed, missing = {}, (str(error),)
    here = [snapshot.folder / name for name in needed if name not in missing]
    return sum(path.stat().st_size for path in here), missing


def _drafter(name: str, checkpoint: Checkpoint) -> tuple[str | None, str]:
    try:
        return choose_drafter(name, checkpoint, "auto")
    except CheckpointError as error:
        return None, str(error)
