"""Gemma 4 assistant: a small drafter that has no keys of its own and reads the target's cache in place.

Source: transformers 5.22.2, models/gemma4_assistant. One draft step takes the target's embedding of a token
and a hidden state as wide as the target's, and gives a token and the hidden state of the next step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.cache import MAX_BLOCK, Cache, KeyValueCache
from mtp_mlx.memory import Layout, Rows, Traffic
from mtp_mlx.models.base import weight_bytes
from mtp_mlx.models.gemma4 import FULL, DecoderLayer, TextConfig
from mtp_mlx.models.gemma4 import Model as Gemma4
from mtp_mlx.types import Mask, Pick, Span, State, Visible


@dataclass(frozen=True)
class Config:
    text: TextConfig
    backbone_hidden_size: int  # the target's width
    use_ordered_embeddings: bool
    num_centroids: int
    centroid_intermediate_top_k: int

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no network can be built from."""
        if not (isinstance(self.backbone_hidden_size, int) and self.backbone_hidden_size > 0):
            raise ValueError(f"backbone_hidden_size is {self.backbone_hidden_size!r}, expected a whole number above 0")
        if not isinstance(self.use_ordered_embeddings, bool):
            raise ValueError(f"use_ordered_embeddings is {self.use_ordered_embeddings!r}, expected true or false")
        groups, top_k = self.num_centroids, self.centroid_intermediate_top_k
        if self.use_ordered_embeddings and not (0 < top_k <= groups and self.text.vocab_size % groups == 0):
            raise ValueError(f"{top_k} of {groups} centroids do not fit a vocabulary of {self.text.vocab_size}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a config.json. Raises KeyError with the name of a key that has no default."""
        # Some files say 0 shared layers; an assistant has no keys of its own in any of them.
        text = {**config["text_config"], "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        parsed = TextConfig.from_dict({**config, "text_config": text})
        return cls(
            text=replace(parsed, num_kv_shared_layers=len(parsed.layer_types), use_double_wide_mlp=False),
            backbone_hidden_size=config["backbone_hidden_size"],
            use_ordered_embeddings=config.get("use_ordered_embeddings", False),
            num_centroids=config.get("num_centroids", 2048),
            centroid_intermediate_top_k=config.get("centroid_intermediate_top_k", 32),
        )


class Scores(NamedTuple):
    """Draft logits, over the whole vocabulary or over candidates only."""

    logits: mx.array  # (B, L, C)
    ids: mx.array | None  # (B, L, C) token of each column; None: the column is the token


class MaskedEmbedding(nn.Module):
    """Ordered head: score the centroids of token groups, then only the tokens of the best groups."""

    def __init__(self, config: Config):
        super().__init__()
        self.centroids = nn.Linear(config.text.hidden_size, config.num_centroids, bias=False)
        self.token_ordering = mx.zeros((config.text.vocab_size,), mx.int32)
        self.groups = config.num_centroids
        self.top_k = config.centroid_intermediate_top_k

    def __call__(self, n: mx.array, table: nn.Embedding) -> Scores:
        """Scores of the (B, L, top_k * V / centroids) candidate tokens for n, (B, L, D)."""
        nearest = mx.argpartition(self.centroids(n), kth=-self.top_k, axis=-1)[..., -self.top_k :]
        ids = self.token_ordering.reshape(self.groups, -1)[nearest].flatten(-2)  # (B, L, C)
        return Scores((table(ids) @ n[..., None])[..., 0], ids)


class Layers(nn.Module):
    """The part of the checkpoint under `model.`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        # Only ever the output head: the assistant looks tokens up in the target's table.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i) for i in range(len(config.layer_types))]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Step(NamedTuple):
    """The outcome of one draft step."""

    scores: Scores
    hidden: mx.array  # (B, 1, backbone width), input of the next step


class Model(nn.Module):
    """The network of one draft step."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, backbone = config.text.hidden_size, config.backbone_hidden_size
        self.model = Layers(config.text)
        self.pre_projection = nn.Linear(2 * backbone, width, bias=False)
        self.post_projection = nn.Linear(width, backbone, bias=False)
        if config.use_ordered_embeddings:
            self.masked_embedding = MaskedEmbedding(config)

    @property
    def layout(self) -> Layout:
        """Nothing of its own: the target's last layer of each kind."""
        text = self.config.text
        kinds = {kind: text.layer_types.index(kind) for kind in sorted(set(text.layer_types))}
        return tuple(
            Rows(
                text.kv_heads[i],
                text.head_dims[i],
                None if kind == FULL else text.sliding_window,
                text.layer_types.count(kind),
                owned=False,
            )
            for kind, i in kinds.items()
        )

    @property
    def traffic(self) -> Traffic:
        share = self.config.centroid_intermediate_top_k / self.config.num_centroids
        return Traffic(output="model.embed_tokens", share=share if self.config.use_ordered_embeddings else 1.0)

    def __call__(
        self,
        embedding: mx.array,  # (B, 1, backbone width) the target's, scaled
        hidden: mx.array,  # (B, 1, backbone width)
        memory: Mapping[str, tuple[Visible, Mask]],  # kind of layer -> the target's keys and values
        span: Span,
    ) -> Step:
        h = self.pre_projection(mx.concatenate([embedding, hidden], axis=-1))
        for layer, kind in zip(self.model.layers, self.config.text.layer_types, strict=True):
            visible, mask = memory[kind]
            h, _ = layer(h, None, visible, mask, span)
        n = self.model.norm(h)
        table = self.model.embed_tokens
        ordered = self.config.use_ordered_embeddings
        scores = self.masked_embedding(n, table) if ordered else Scores(table.as_linear(n), None)
        return Step(scores, self.post_projection(n))

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Parameters of this model out of a checkpoint's tensors."""
        kept = {name: array for name, array in weights.items() if name != "lm_head.weight"}  # tied
        if "masked_embedding.token_ordering" in kept:
            ordering = kept["masked_embedding.token_ordering"]
            kept["masked_embedding.token_ordering"] = ordering.astype(mx.int32)
        return kept


@dataclass(frozen=True)
class Assistant:
    """The drafter: chains draft steps from the last kept hidden, the position held still.

    The position of the query is that of the token the target has just chosen, P, plus `position_offset`.
    transformers and llama.cpp use P; vLLM, SGLang and mlx-vlm use P-1. The visible keys are the same in both
    cases: all committed ones, or the last `sliding_window` of them.
    """

    network: Model
    target: Gemma4
    position_offset: int = 0
    limit: int = MAX_BLOCK - 1
    reads_prompt: bool = False  # its state is the hidden of one token

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; the target's table and cache are not counted again."""
        return weight_bytes(self.network)

    def kv_bytes(self, tokens: int) -> int:
        return 0  # it has none of its own

    def reads(self, cache: Cache) -> int:
        return sum(array.nbytes for layer in self._layers(cache).values() for array in layer.arrays())

    def start(self, cache: Cache) -> State:
        return ()

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        """The state is the target's hidden of the last kept token, (B, 1, D)."""
        return (mx.take_along_axis(hidden, count[:, None, None], axis=1),)

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        (hidden,) = state
        span = Span(cache.position + self.position_offset, 1)
        memory = self._memory(cache)
        token = last[:, None]
        for _ in range(k):
            scores, hidden = self.network(self.target.embed(token), hidden, memory, span)
            token = pick(*scores)

    def _layers(self, cache: Cache) -> dict[str, KeyValueCache]:
        """The target's last sliding and last full layer."""
        kinds = sorted(set(self.network.config.text.layer_types))
        return {kind: cache.attention(self.target.config.owner(kind)) for kind in kinds}

    def _memory(self, cache: Cache) -> dict[str, tuple[Visible, Mask]]:
        """All that the newest kept token can see in them."""
        newest = Span(cache.position - 1, 1)
        return {kind: (layer.stored(), layer.mask(newest)) for kind, layer in self._layers(cache).items()}


def check_ordering(ordering: mx.array) -> None:
    """Raises ValueError unless the ordered head's table names every token once; MLX reads beyond tables unasked."""
    if not mx.array_equal(mx.sort(ordering), mx.arange(ordering.size)):
        raise ValueError("masked_embedding.token_ordering is not a permutation of the vocabulary")


def mismatches(drafter: Config, target: TextConfig) -> list[str]:
    """Everything that keeps an assistant from working with a target, in words; empty if they fit."""
    text = drafter.text
    pairs: list[tuple[str, Any, Any]] = [
        ("hidden size", drafter.backbone_hidden_size, target.hidden_size),
        ("vocabulary", text.vocab_size, target.vocab_size),
        ("sliding window", text.sliding_window, target.sliding_window),
    ]
    strange = set(text.layer_types) - set(target.layer_types[: target.first_shared])
    if strange:
        pairs.append(("layer types", sorted(set(text.layer_types)), sorted(set(target.layer_types))))
    for kind in sorted(set(text.layer_types) - strange):
        own, read = text.layer_types.index(kind), target.owner(kind)
        pairs.append((f"KV heads in {kind}", text.kv_heads[own], target.kv_heads[read]))
        pairs.append((f"head size in {kind}", text.head_dims[own], target.head_dims[read]))
        pairs.append((f"RoPE in {kind}", dict(text.rope[kind]), dict(target.rope[kind])))
    return [f"{name} {given}, target has {wanted}" for name, given, wanted in pairs if given != wanted]
