"""A checkpoint of which only shapes are wanted: networks are filled with arrays that nobody ever computes.

Every check of names and shapes is the one that loading makes. A folder with nothing but a config.json is taken at its
word.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import SwitchLinear

from mtp_mlx.checkpoint import Checkpoint, text_part
from mtp_mlx.errors import CheckpointError
from mtp_mlx.memory import Network
from mtp_mlx.models.base import HEAD_WIDTH

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Sketch(Checkpoint):
    """One folder, opened to be looked at."""

    @property
    def bare(self) -> bool:
        """Whether there are no weights, only a config."""
        return self.file is None and not any(self.folder.glob("*.safetensors*"))

    def shards(self) -> list[Path]:
        return [] if self.bare else super().shards()

    def names(self) -> set[str]:
        promised = text_part(self.config).get("mtp_num_hidden_layers")
        return {f"mtp.{HEAD_WIDTH}"} if self.bare and promised else super().names()

    def fill(
        self,
        model: nn.Module,
        sanitize: Callable[[Mapping[str, mx.array]], dict[str, mx.array]],
        dtype: mx.Dtype | None = None,
        exact: tuple[str, ...] = (),
    ) -> None:
        """As a checkpoint fills a model, but for reading the weights."""
        if self.bare:
            self._imagine(model, dtype)
        else:
            self.lay(model, sanitize, dtype, exact)

    def _imagine(self, model: nn.Module, dtype: mx.Dtype | None) -> None:
        """Weights as the config says: of its dtype, and quantised wherever its settings can be applied."""
        settings = self.quantization()
        if settings is not None:
            self._quantise(model, settings)
        wanted = dtype or self.dtype()

        def stand_in(array: mx.array) -> mx.array:
            if array.dtype == mx.int32:  # a table of token ids
                return mx.arange(array.size).reshape(array.shape)
            return array.astype(wanted) if mx.issubdtype(array.dtype, mx.floating) else array

        model.update(tree_map(stand_in, model.parameters()))

    def _quantise(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        group = settings.get("group_size", 64)
        default = {name: settings[name] for name in ("group_size", "bits", "mode") if name in settings}

        def choice(path: str, module: nn.Module) -> bool | dict[str, Any]:
            entries = (settings.get(f"{prefix}{path}") for prefix in ("", "language_model."))
            own = next((entry for entry in entries if entry is not None), None)
            if isinstance(own, dict) or own is False:
                return own
            whole = isinstance(module, nn.Linear | nn.Embedding | SwitchLinear) and module.weight.shape[-1] % group == 0
            return default if whole else False

        try:
            nn.quantize(model, class_predicate=choice)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(
                f"{self.folder}: this MLX cannot apply the quantisation {default}: {error}"
            ) from error

    def dtype(self) -> mx.Dtype:
        """The dtype that its config names."""
        text = self.config.get("text_config")
        for place in (self.config, text if isinstance(text, Mapping) else {}):
            for name in ("dtype", "torch_dtype"):
                if place.get(name) in _DTYPES:
                    return _DTYPES[place[name]]
        return mx.bfloat16


def precision(network: Network) -> mx.Dtype:
    """What a network computes in, and so the dtype of the keys and values it leaves: that of its norms."""
    assert isinstance(network, nn.Module)
    parameters: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
    return next(array.dtype for name, array in parameters.items() if name.endswith("norm.weight"))
