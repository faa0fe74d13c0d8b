"""The machines that mlx.launch has started a command on."""

from typing import Annotated

import mlx.core as mx
import typer

from mtp_mlx.errors import GroupError, RequestError

BACKENDS = ("any", "ring", "jaccl", "mpi", "nccl")  # mlx.launch's, and whichever it has prepared

Backend = Annotated[
    str,
    typer.Option(
        help="How machines talk that mlx.launch has started this on: ring, jaccl, mpi or nccl; 'any' finds out, and "
        "that there is one machine."
    ),
]


def join(backend: str = "any") -> mx.distributed.Group | None:
    """The group of machines, None for one machine. Waits until all of them are there.

    Raises RequestError for a backend that is unknown, or has not been prepared by mlx.launch, and GroupError where
    mlx.launch has started machines that do not find each other.
    """
    if backend not in BACKENDS:
        raise RequestError(f"--backend {backend} is not one of {', '.join(BACKENDS)}")
    try:
        group = mx.distributed.init(strict=backend != "any", backend=backend)
    except (RuntimeError, ValueError) as error:
        if backend == "any":
            raise GroupError(
                f"the machines of mlx.launch have not found each other ({error}); what another one says may tell why; "
                "start all of them again"
            ) from error
        raise RequestError(
            f"--backend {backend} cannot be used here ({error}); start this with mlx.launch --backend {backend}"
        ) from error
    return group if group.size() > 1 else None


def refuse_group() -> None:
    """Raises RequestError where a command that is made for one machine runs on several."""
    group = join()
    if group is not None:
        raise RequestError(
            f"this command runs on one machine, and mlx.launch has started it as rank {group.rank()} of "
            f"{group.size()}; start it without mlx.launch, or use mtp-mlx generate"
        )
