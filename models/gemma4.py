"""Gemma 4 text model, every size: E2B, E4B (per-layer embeddings, shared KV), 12B (unified), 26B-A4B, 31B.

Source: transformers 5.22.2, models/gemma4 and models/gemma4_unified. Parameters are named as in mlx-lm's
gemma4_text, so that weights can be handed over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from mtp_mlx.cache import MAX_BLOCK, Cache, KeyValueCache, SlidingCache, full_cache
from mtp_mlx.memory import Layout, Rows, Traffic, kv_bytes
from mtp_mlx.models import base, parts
from mtp_mlx.types import Mask, Output, PlainRows, Span, Visible

SLIDING = "sliding_attention"
FULL = "full_attention"

_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}

_MAY_BE_ZERO = {
    "num_kv_shared_layers",
    "per_layer_width",
    "per_layer_vocab",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
}
# What a config may say without changing the network, the default first.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (None, "vision"),  # "vision" is about image tokens
    "attention_bias": (False, None),
}


@dataclass(frozen=True)
class TextConfig:
    """The text part of a Gemma 4 config. What differs from layer to layer is a tuple with one entry each."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    layer_types: tuple[str, ...]
    head_dims: tuple[int, ...]
    kv_heads: tuple[int, ...]
    rope: Mapping[str, Mapping[str, Any]]
    sliding_window: int
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float | None
    tie_word_embeddings: bool
    attention_k_eq_v: bool
    num_kv_shared_layers: int
    use_double_wide_mlp: bool
    per_layer_width: int  # hidden_size_per_layer_input: 0 where there are no per-layer embeddings
    per_layer_vocab: int
    num_experts: int  # 0 in a dense model
    top_k_experts: int
    moe_intermediate_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TextConfig":
        """Read a config.json, with or without a nested `text_config`, in the flat or the per-layer style.

        Raises KeyError with the name of a key that has no default.
        """
        text: Mapping[str, Any] = config.get("text_config") or config
        unified = "unified" in str(config.get("model_type")) + str(text.get("model_type"))
        kinds = _layer_types(text)
        base.check_choices(text, _ONLY)
        head_dims, kv_heads = _per_layer(text, kinds)
        return cls(
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_attention_heads=text["num_attention_heads"],
            vocab_size=text.get("vocab_size") or config["vocab_size"],
            layer_types=kinds,
            head_dims=head_dims,
            kv_heads=kv_heads,
            rope={kind: _ROPE[kind] | ((text.get("rope_parameters") or {}).get(kind) or {}) for kind in _ROPE},
            sliding_window=text.get("sliding_window", 512),
            max_position_embeddings=text.get("max_position_embeddings", 131_072),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            final_logit_softcapping=text.get("final_logit_softcapping"),
            tie_word_embeddings=text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)),
            attention_k_eq_v=text.get("attention_k_eq_v", False),
            num_kv_shared_layers=text.get("num_kv_shared_layers", 0),
            use_double_wide_mlp=text.get("use_double_wide_mlp", False),
            per_layer_width=text.get("hidden_size_per_layer_input", 0 if unified else 256),
            per_layer_vocab=text.get("vocab_size_per_layer_input", 262_144),
            num_experts=text["num_experts"] if text.get("enable_moe_block") else 0,
            top_k_experts=text.get("top_k_experts") or 0,
            moe_intermediate_size=text.get("moe_intermediate_size") or 0,
        )

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no network can be built from."""
        values = vars(self)
        base.check_numbers(values, fields(self), _MAY_BE_ZERO)
        for name in ("head_dims", "kv_heads"):
            if not all(isinstance(value, int) and value > 0 for value in values[name]):
                raise ValueError(f"{name} are {values[name]}, expected whole numbers above 0")
        if any(self.num_attention_heads % heads for heads in self.kv_heads):
            raise ValueError(f"{self.num_attention_heads} heads cannot share {sorted(set(self.kv_heads))} KV heads")
        if self.num_kv_shared_layers > len(self.layer_types):
            raise ValueError(f"{self.num_kv_shared_layers} of {len(self.layer_types)} layers cannot share keys")
        if self.num_experts and not 0 < self.top_k_experts <= self.num_experts:
            raise ValueError(f"top_k_experts is {self.top_k_experts}, with {self.num_experts} experts")
        cap = self.final_logit_softcapping
        if not (self.rms_norm_eps > 0 and (cap is None or cap > 0)):
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps} and final_logit_softcapping {cap}")

    @property
    def first_shared(self) -> int:
        """Index of the first layer that has no keys and values of its own."""
        return len(self.layer_types) - self.num_kv_shared_layers

    def owner(self, kind: str) -> int:
        """The last layer of a kind that has keys and values of its own: the shared layers and the drafter read it."""
        return max(i for i, name in enumerate(self.layer_types[: self.first_shared]) if name == kind)


def _layer_types(text: Mapping[str, Any]) -> tuple[str, ...]:
    count = text["num_hidden_layers"]
    given = text.get("layer_types")
    if given is not None:
        if len(given) != count or not set(given) <= {SLIDING, FULL}:
            raise ValueError(f"layer_types must be {count} times {SLIDING} or {FULL}, as num_hidden_layers says")
        return tuple(given)
    return tuple(FULL if (i + 1) % 6 == 0 or i + 1 == count else SLIDING for i in range(count))


def _per_layer(text: Mapping[str, Any], kinds: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Head size and number of KV heads of every layer.

    Released files have `global_head_dim` and `num_global_key_value_heads` for the full layers; what
    transformers saves today has `per_layer_config`, a table from layer index to the values that differ.
    """
    size, heads = text.get("head_dim", 256), text["num_key_value_heads"]
    table = text.get("per_layer_config")
    if table is not None:
        rows = [table.get(str(i)) or {} for i in range(len(kinds))]
        return (
            tuple(row.get("head_dim", size) for row in rows),
            tuple(row.get("num_key_value_heads", heads) for row in rows),
        )
    full_size = text.get("global_head_dim") or 512
    full_heads = (text.get("num_global_key_value_heads") if text.get("attention_k_eq_v") else None) or heads
    return (
        tuple(full_size if kind == FULL else size for kind in kinds),
        tuple(full_heads if kind == FULL else heads for kind in kinds),
    )


class RoPE:
    """Rotary position embedding of one kind of layer. No weights, hence no module.

    "proportional" turns only the first pairs of a head, but spaces their frequencies over the whole head.
    """

    def __init__(self, parameters: Mapping[str, Any], size: int):
        kind = parameters["rope_type"]
        if kind not in ("default", "proportional"):
            raise ValueError(f"rope_type {kind!r} is not one of Gemma 4's: default, proportional")
        self._size = size
        self._theta: float | None = parameters["rope_theta"]
        self._frequencies: mx.array | None = None
        if kind == "proportional":
            turned = int(size * parameters.get("partial_rotary_factor", 1.0)) // 2
            periods = self._theta ** (mx.arange(0, 2 * turned, 2, dtype=mx.float32) / size)
            still = mx.full((size // 2 - turned,), mx.inf)
            self._frequencies = mx.concatenate([periods * parameters.get("factor", 1.0), still])
            mx.eval(self._frequencies)  # what is not computed yet can only be computed by the thread that made it
            self._theta = None

    def __call__(self, x: mx.array, span: Span) -> mx.array:
        """Turn (B, H, L, head size) by the block's positions."""
        return mx.fast.rope(
            x,
            self._size,
            traditional=False,
            base=self._theta,
            scale=1.0,
            offset=span.start,
            freqs=self._frequencies,
        )


class Attention(nn.Module):
    """Grouped-query attention with scale 1. A layer without keys of its own reads another layer's."""

    def __init__(self, config: TextConfig, i: int):
        super().__init__()
        self.head_size = config.head_dims[i]
        self.eps = config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads[i]
        self.owns_kv = i < config.first_shared
        # Keys that later layers and the drafter do not read.
        self.private = self.owns_kv and i != config.owner(config.layer_types[i])
        self.total: parts.Total = parts.alone
        # K=V: full layers of the larger models have no v_proj, the raw key projection serves as value.
        self.values_from_keys = config.attention_k_eq_v and config.layer_types[i] == FULL
        width, kv_width = config.hidden_size, config.kv_heads[i] * self.head_size
        query_width = config.num_attention_heads * self.head_size

        self.q_proj = nn.Linear(width, query_width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_size, eps=self.eps)
        self.o_proj = nn.Linear(query_width, width, bias=False)
        if self.owns_kv:
            self.k_proj = nn.Linear(width, kv_width, bias=False)
            self.k_norm = nn.RMSNorm(self.head_size, eps=self.eps)
            if not self.values_from_keys:
                self.v_proj = nn.Linear(width, kv_width, bias=False)
        self._rope = RoPE(config.rope[config.layer_types[i]], self.head_size)

    def keys_and_values(self, x: mx.array, span: Span) -> PlainRows:
        """The block's own rows, (B, H, L, head size), ready for the cache."""
        raw = base.split_heads(self.k_proj(x), self.head_size)
        values = raw if self.values_from_keys else base.split_heads(self.v_proj(x), self.head_size)
        keys = self._rope(self.k_norm(raw).swapaxes(1, 2), span)
        return PlainRows(keys, mx.fast.rms_norm(values, None, self.eps).swapaxes(1, 2))

    def __call__(self, x: mx.array, visible: Visible, mask: Mask, span: Span) -> mx.array:
        B, L, _ = x.shape
        queries = self.q_norm(base.split_heads(self.q_proj(x), self.head_size))
        queries = self._rope(queries.swapaxes(1, 2), span)
        out = visible.attend(queries, 1.0, mask)
        return self.total(self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1)))

    def share(self, part: parts.Part) -> None:
        """Keep one machine's heads; what others read stays whole, so that they find all of it on every machine."""
        own = part.heads(self.heads, self.kv_heads, self.head_size, self.o_proj) if self.private else None
        if own is None:
            return
        queries, keys = parts.times(own.queries, self.head_size), parts.times(own.keys, self.head_size)
        parts.keep_rows(self.q_proj, queries)
        parts.keep_columns(self.o_proj, queries)
        for matrix in [self.k_proj] if self.values_from_keys else [self.k_proj, self.v_proj]:
            parts.keep_rows(matrix, keys)
        self.heads, self.kv_heads, self.total = len(own.queries), len(own.keys), part.total


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))
        return y


class GeGLU(nn.Module):
    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return nn.gelu_approx(gate) * x


class Router(nn.Module):
    """Picks the experts of each token, and their weights. It sees the residual stream, not a normed input."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self.top_k = config.top_k_experts
        self.root = config.hidden_size**-0.5
        self.eps = config.rms_norm_eps

    def __call__(self, h: mx.array) -> tuple[mx.array, mx.array]:
        scores = self.proj(mx.fast.rms_norm(h, self.scale * self.root, self.eps))  # (B, L, E)
        chosen = mx.argpartition(scores, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        # A softmax over the chosen scores is the softmax over all of them, renormalised.
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        return chosen, weights * self.per_expert_scale[chosen]


class Experts(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.switch_glu = SwitchGLU(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            activation=GeGLU(),
            bias=False,
        )

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        return (self.switch_glu(x, chosen) * weights[..., None]).sum(-2)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, i: int):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        wide = config.use_double_wide_mlp and i >= config.first_shared
        self.self_attn = Attention(config, i)
        self.mlp = MLP(width, config.intermediate_size * (2 if wide else 1))
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(width, eps=eps)
        self.has_experts = config.num_experts > 0
        if self.has_experts:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = nn.RMSNorm(width, eps=eps)
            self.pre_feedforward_layernorm_2 = nn.RMSNorm(width, eps=eps)
            self.post_feedforward_layernorm_2 = nn.RMSNorm(width, eps=eps)
        if config.per_layer_width:
            self.per_layer_input_gate = nn.Linear(width, config.per_layer_width, bias=False)
            self.per_layer_projection = nn.Linear(config.per_layer_width, width, bias=False)
            self.post_per_layer_input_norm = nn.RMSNorm(width, eps=eps)
        self.layer_scalar = mx.ones((1,))
        self.total: parts.Total = parts.alone

    def __call__(
        self,
        h: mx.array,  # (B, L, D)
        own: KeyValueCache | None,
        shared: Visible | None,
        mask: Mask,
        span: Span,
        per_layer: mx.array | None = None,  # (B, L, per-layer width)
    ) -> tuple[mx.array, Visible]:
        """The new residual stream, and the keys and values that were attended to.

        A layer has a cache of its own, or it is given what an earlier layer of its kind has seen.
        """
        x = self.input_layernorm(h)
        if own is not None:
            shared = own.write(*self.self_attn.keys_and_values(x, span), span)
        assert shared is not None, "a layer without keys needs another layer's"
        h = h + self.post_attention_layernorm(self.self_attn(x, shared, mask, span))
        return self._feed_forward(h, per_layer), shared

    def _feed_forward(self, h: mx.array, per_layer: mx.array | None) -> mx.array:
        r = self.mlp(self.pre_feedforward_layernorm(h))
        r = self._with_experts(r, h) if self.has_experts else self.total(r)
        h = h + self.post_feedforward_layernorm(r)
        if per_layer is not None:
            gate = nn.gelu_approx(self.per_layer_input_gate(h)) * per_layer
            h = h + self.post_per_layer_input_norm(self.per_layer_projection(gate))
        return h * self.layer_scalar

    def _with_experts(self, r: mx.array, h: mx.array) -> mx.array:
        routed = self.experts(self.pre_feedforward_layernorm_2(h), *self.router(h))
        if self.total is not parts.alone:  # machines that send each other one message in place of two
            r, routed = self.total(mx.stack([r, routed]))
        return self.post_feedforward_layernorm_1(r) + self.post_feedforward_layernorm_2(routed)

    def share(self, part: parts.Part) -> None:
        """Keep one machine's heads, and its channels of the MLP and of every expert."""
        self.self_attn.share(part)
        experts = [self.experts.switch_glu] if self.has_experts else []
        self.total = parts.keep_inner(part, self.mlp, *experts)


class TextModel(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        depth, width = len(config.layer_types), config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = [DecoderLayer(config, i) for i in range(depth)]
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        if config.per_layer_width:
            packed = depth * config.per_layer_width
            self.embed_tokens_per_layer = nn.Embedding(config.per_layer_vocab, packed)
            self.per_layer_model_projection = nn.Linear(width, packed, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(config.per_layer_width, eps=config.rms_norm_eps)

    def embed(self, tokens: mx.array) -> mx.array:
        return self.embed_tokens(tokens) * self.config.hidden_size**0.5

    def _per_layer_inputs(self, tokens: mx.array, h: mx.array) -> list[mx.array | None]:
        """What each layer is told about the tokens themselves: a lookup, joined to a projection of h."""
        depth, width = len(self.layers), self.config.per_layer_width
        if not width:
            return [None] * depth
        looked_up = mx.unflatten(self.embed_tokens_per_layer(tokens) * width**0.5, -1, (depth, width))
        projected = self.per_layer_model_projection(h) * self.config.hidden_size**-0.5
        projected = self.per_layer_projection_norm(mx.unflatten(projected, -1, (depth, width)))
        joined = (projected + looked_up) * 2.0**-0.5  # (B, L, depth, width)
        return [joined[:, :, i] for i in range(depth)]

    def __call__(self, tokens: mx.array, cache: Cache, span: Span) -> mx.array:
        h = self.embed(tokens)
        per_layer = self._per_layer_inputs(tokens, h)
        kinds = self.config.layer_types
        masks = {kind: cache.attention(self.config.owner(kind)).mask(span) for kind in set(kinds)}
        seen: dict[str, Visible] = {}
        for i, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            own = cache.attention(i) if i < self.config.first_shared else None
            h, seen[kind] = layer(h, own, seen.get(kind), masks[kind], span, per_layer[i])
        return self.norm(h)


class Model(nn.Module):
    """The target: one pass gives the logits and the hidden after the final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        kinds = config.layer_types
        if not kinds or not set(kinds) <= set(kinds[: config.first_shared]):
            raise ValueError(f"the last {config.num_kv_shared_layers} of {len(kinds)} layers share keys nobody has")
        self.config = config
        self.context = config.max_position_embeddings
        self.vocabulary = config.vocab_size
        self.model = TextModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return base.weight_bytes(self)

    @property
    def layers(self) -> list[DecoderLayer]:
        """Where mlx-lm's adapters look for them."""
        return self.model.layers

    @property
    def layout(self) -> Layout:
        """What its cache holds: layers that share keys are further readers of their owner's."""
        config = self.config
        shared = config.layer_types[config.first_shared :]
        return tuple(
            Rows(
                self.layers[i].self_attn.kv_heads,
                config.head_dims[i],
                None if kind == FULL else config.sliding_window,
                1 + (shared.count(kind) if i == config.owner(kind) else 0),
            )
            for i, kind in enumerate(config.layer_types[: config.first_shared])
        )

    @property
    def traffic(self) -> Traffic:
        chosen = self.config.top_k_experts if self.config.num_experts else 0
        return Traffic(chosen, "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head")

    def kv_bytes(self, tokens: int, kv_bits: int | None = None) -> int:
        return kv_bytes(self.layout, tokens, kv_bits, self.model.norm.weight.dtype.size, MAX_BLOCK)

    def make_cache(self, kv_bits: int | None = None) -> Cache:
        kinds = self.config.layer_types[: self.config.first_shared]
        return Cache(
            [
                full_cache(size, kv_bits) if kind == FULL else SlidingCache(self.config.sliding_window)
                for kind, size in zip(kinds, self.config.head_dims, strict=False)
            ]
        )

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled token embeddings, (B, L) -> (B, L, D)."""
        return self.model.embed(tokens)

    def __call__(self, tokens: mx.array, cache: Cache, span: Span) -> Output:
        hidden = self.model(tokens, cache, span)
        head = self.model.embed_tokens.as_linear if self.config.tie_word_embeddings else self.lm_head
        logits = head(hidden)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = mx.tanh(logits / cap) * cap
        return Output(logits, hidden)

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Parameters of this model out of a checkpoint's tensors: text only, experts split, duplicates left out."""
        kept: dict[str, mx.array] = {}
        for given, array in weights.items():
            name = _rename(given)
            if name.startswith(_OTHER_MODALITIES) or _is_ballast(name, self.config):
                continue
            kept.update(base.split_experts(name, array, "experts.switch_glu"))
        return kept


_OTHER_MODALITIES = (
    "vision_tower",
    "vision_embedder",
    "multi_modal_projector",
    "audio_tower",
    "embed_vision",
    "embed_audio",
)


def _rename(name: str) -> str:
    """A tensor's name without the wrapper around the text model, or around the other modalities."""
    inner = name.removeprefix("model.")
    return inner if inner.startswith(_OTHER_MODALITIES) else base.rename(name)


def _is_ballast(name: str, config: TextConfig) -> bool:
    """Tensors that some checkpoints carry and nothing needs."""
    parts = [*name.split("."), "", ""]
    if parts[0] == "lm_head":
        return config.tie_word_embeddings
    if "rotary_emb" in parts:
        return True
    shared = parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) >= config.first_shared
    return shared and any(part in parts for part in ("k_proj", "v_proj", "k_norm"))
