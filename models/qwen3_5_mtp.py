"""Qwen's native mtp head: one layer of attention that reads the target's hidden and guesses the token after the next.

Source: vLLM, models/qwen3_5_mtp; transformers has no forward for it. For every pair of a token and the target's
hidden of the token before, the head keeps a key and a value of its own, in a layer attached to the target's cache.
The slot of a pair is the position of its hidden.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.cache import MAX_BLOCK, Cache, FullCache, KeyValueCache
from mtp_mlx.memory import Layout, Rows, Traffic, kv_bytes
from mtp_mlx.models import base
from mtp_mlx.models.qwen3_5 import FULL, DecoderLayer, Stored, TextConfig, is_raw
from mtp_mlx.models.qwen3_5 import Model as Qwen
from mtp_mlx.types import Pick, PlainRows, Span, State


class Network(nn.Module):
    """The tensors under `mtp.`; embeddings and output head are the target's."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.pre_fc_norm_embedding = nn.RMSNorm(width, eps=eps)
        self.pre_fc_norm_hidden = nn.RMSNorm(width, eps=eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = [DecoderLayer(config, FULL)]
        self.norm = nn.RMSNorm(width, eps=eps)

    @property
    def layout(self) -> Layout:
        """Its own layer, attached to the target's."""
        return (Rows(self.config.num_key_value_heads, self.config.head_dim),)

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.config.num_experts_per_tok)

    def remember(self, embedding: mx.array, hidden: mx.array, cache: KeyValueCache, span: Span) -> None:
        """Keep the keys and values of pairs (B, L, D) x 2: all that they leave behind."""
        layer = self.layers[0]
        x = layer.input_layernorm(self._joined(embedding, hidden))
        cache.write(*layer.self_attn.keys_and_values(x, span), span)

    def __call__(
        self, embedding: mx.array, hidden: mx.array, stored: Stored | None, fresh: list[PlainRows], span: Span
    ) -> mx.array:
        """The head's hidden for one pair, (B, 1, D), after its norm; the pair's keys and values join `fresh`."""
        return self.norm(self.layers[0].attend_beside(self._joined(embedding, hidden), stored, fresh, span))

    def _joined(self, embedding: mx.array, hidden: mx.array) -> mx.array:
        pair = [self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)]  # the embedding comes first
        return self.fc(mx.concatenate(pair, axis=-1))


@dataclass(frozen=True)
class Head:
    """The drafter. Every kept token is paired with a true hidden of the target, from the first of the prompt on;
    in a draft of several tokens the head's own hidden stands in, and what that gives is kept out of its layer."""

    network: Network
    target: Qwen
    limit: int = MAX_BLOCK - 1
    reads_prompt: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; the target's embeddings and output head are not counted again."""
        return base.weight_bytes(self.network)

    def kv_bytes(self, tokens: int) -> int:
        return kv_bytes(self.network.layout, tokens, None, self.network.norm.weight.dtype.size)

    def reads(self, cache: Cache) -> int:
        return 0  # its layer is its own, and a draft writes nothing

    def start(self, cache: Cache) -> State:
        cache.attach(FullCache())
        return ()

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        """The state is the target's hidden of the last kept token, (B, 1, D): the one that is not paired yet."""
        # Token i goes with the hidden before it: that of the last kept token, then those of the block itself.
        before, slots = hidden[:, :-1], Span(span.start, span.length - 1)
        if not state:
            tokens = tokens[:, 1:]  # nothing comes before the first token of a text
        else:
            before = mx.concatenate([*state, before], axis=1)
            slots = Span(span.start - 1, span.length)
        if slots.length:
            self.network.remember(self.target.embed(tokens), before, self._pairs(cache), slots)
        return (mx.take_along_axis(hidden, count[:, None, None], axis=1),)

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        (hidden,) = state
        token, fresh = last[:, None], list[PlainRows]()
        stored = self._stored(cache)
        for i in range(k):
            slot = Span(cache.position - 1 + i, 1)
            hidden = self.network(self.target.embed(token), hidden, stored, fresh, slot)
            token = pick(self.target.logits(hidden))

    def _stored(self, cache: Cache) -> Stored | None:
        """The pairs of all kept tokens but the newest, whose hidden waits for its partner."""
        pairs = self._pairs(cache)
        if not pairs.arrays():
            return None  # of a text with one token there are none
        rows, mask = pairs.stored(), pairs.mask(Span(cache.position - 2, 1))
        assert isinstance(rows, PlainRows) and isinstance(mask, mx.array)
        return Stored(rows, mask)

    def _pairs(self, cache: Cache) -> KeyValueCache:
        """The head's own layer, which stands behind the target's."""
        return cache.attention(len(self.target.config.layer_types))


class Convention(NamedTuple):
    """How a head's file stores its norms: as the difference from 1 (raw, as released), or as they are applied."""

    raw: bool
    reason: str
    overruled: bool = False  # the values say otherwise than the format


# What a config may say of a head that can be run.
ONLY: dict[str, tuple[Any, ...]] = {
    "mtp_num_hidden_layers": (1, 0, None),
    "mtp_use_dedicated_embeddings": (False, None),
}

# Where other programs note how they store a head's norms: file, key, and for each value whether it means raw.
DECLARATIONS: tuple[tuple[str, str, Mapping[str, bool]], ...] = (
    ("mtplx_runtime.json", "mtp_norm_layout", {"mlx_multiplier": False, "raw_hf_delta": True}),
    ("manifest.json", "rmsnorm_weight_format", {"mlx_gamma": False}),
    ("config.json", "mtp_norm_encoding", {"delta": True, "delta_plus_one": True, "mlx_delta": True}),
    ("config.json", "mtplx_mtp_norm_encoding", {"delta": True, "delta_plus_one": True, "mlx_delta": True}),
)


is_head, is_bare, WIDTH = base.is_head, base.is_bare, base.HEAD_WIDTH


def own_tensors(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The head's tensors under the names they have below `mtp.`; empty if a file holds no head."""
    return {below: weights[name] for name, below in own_names(weights).items()}


def own_names(names: Collection[str]) -> dict[str, str]:
    """The names of the head's tensors among those of a file, and what each is called below `mtp.`."""
    if is_bare(names):
        return {name: name for name in names}
    return {name: base.HEAD_PREFIX.sub("", name) for name in names if base.HEAD_PREFIX.match(name)}


def convention(
    weights: Mapping[str, mx.array], declared: Convention | None, split: bool, metadata: str | None
) -> Convention:
    """Decide how a file stores its norms: by its format, unless the values rule that out.

    `weights` are all tensors of the checkpoint or file, `declared` is what its writer says, `split` means a folder of
    type qwen3_5_mtp with the names its converter gives, `metadata` is the "format" of the safetensors header. A head
    read in the wrong convention drafts nonsense without any error.
    """
    found = _by_format(weights, declared, split, metadata)
    tensors = own_tensors(weights)
    means = [_mean(tensors[name]) for name in _LAYER_NORMS if name in tensors]
    mean = sum(means) / max(len(means), 1)
    if found is None:
        return Convention(mean < _BETWEEN, f"the format does not tell, the layer norms' mean of {mean:.2f} does")
    if means and (mean > _APPLIED if found.raw else mean < _RAW):
        reason = f"the layer norms' mean of {mean:.2f} rules out what the format says: {found.reason}"
        return Convention(not found.raw, reason, overruled=True)
    return found


def _by_format(
    weights: Mapping[str, mx.array], declared: Convention | None, split: bool, metadata: str | None
) -> Convention | None:
    if declared:
        return declared
    if is_raw(weights):
        return Convention(True, "the convolutions beside it are laid out as released")
    if split:
        return Convention(False, "a folder of type qwen3_5_mtp holds them as applied")
    if metadata == "pt":
        return Convention(True, "the file was written by torch")
    return None


# Means in published heads: -0.1 to 0.4 as differences, 0.87 to 1.25 as applied. Those of the other norms overlap.
_LAYER_NORMS = ("layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight")
_RAW, _BETWEEN, _APPLIED = 0.45, 0.65, 0.8
# What mlx-lm's rule for the target's norms leaves out where somebody lets it loose on a head.
_LEFT_OUT = ("norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")
_DENSE = re.compile(r"\.mlp\.(?=(gate|up|down)_proj\.)")
_NORM = re.compile(r"(^|\.)(\w+_norm_\w+|\w*norm)\.weight$")


def _mean(array: mx.array) -> float:
    return cast(float, mx.mean(array.astype(mx.float32)).item())


def exceptions(tensors: Mapping[str, mx.array], raw: bool) -> list[str]:
    """Norms whose values rule the file's convention out for them: some published files mix both.

    No applied norm is negative on average; no layer norm is near 1 as a difference.
    """
    norms = {name: _mean(array) for name, array in tensors.items() if _NORM.search(name)}
    if raw:
        return sorted(name for name in _LAYER_NORMS if norms.get(name, 0.0) > _BETWEEN)
    negative = {name for name, mean in norms.items() if mean < 0}
    left_out = {name for name in _LEFT_OUT if name in norms} if negative & set(_LEFT_OUT) else set()
    return sorted(negative | left_out)


def sanitize(weights: Mapping[str, mx.array], raw: bool) -> dict[str, mx.array]:
    """Parameters of `Network` out of a file's tensors, norms as applied. Raises ValueError for a missing expert."""
    tensors = own_tensors(weights)
    mixed = exceptions(tensors, raw)
    kept: dict[str, mx.array] = {}
    for name, value in unfused(tensors).items():
        shifted = _NORM.search(name) and raw != (name in mixed)
        kept[name] = value + 1 if shifted else value
    return kept


def unfused(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A head's own tensors with one stack of experts for each projection. Raises ValueError for a missing expert."""
    kept: dict[str, mx.array] = {}
    for stored, array in base.stack_experts(tensors, "switch_mlp").items():
        # Some writers name stacks of experts like a dense layer's tensors.
        given = _DENSE.sub(".mlp.switch_mlp.", stored) if array.ndim == 3 else stored
        kept.update(base.split_experts(given, array, "switch_mlp"))
    return kept
