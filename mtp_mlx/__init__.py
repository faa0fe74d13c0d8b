"""Lossless multi-token prediction on MLX."""

from mtp_mlx.attach import attach
from mtp_mlx.batches import batch_generate
from mtp_mlx.choosing import Rules
from mtp_mlx.errors import CheckpointError, MTPError, PairError, RequestError
from mtp_mlx.generate import generate, generate_step, stream_generate
from mtp_mlx.generation import Response
from mtp_mlx.loading import load
from mtp_mlx.model import Model
from mtp_mlx.penalties import Penalties
from mtp_mlx.sampling import Greedy, Sample
from mtp_mlx.stats import Stats
from mtp_mlx.types import Pair

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Greedy",
    "MTPError",
    "Model",
    "Pair",
    "PairError",
    "Penalties",
    "RequestError",
    "Response",
    "Rules",
    "Sample",
    "Stats",
    "attach",
    "batch_generate",
    "generate",
    "generate_step",
    "load",
    "stream_generate",
]
