"""Qwen 3.5, 3.6 and 3.8 text model, dense and mixture of experts: three layers of gated delta rule, one of attention.

Source: transformers 5.22.2, models/qwen3_5, qwen3_5_moe and qwen3_next. Parameters are named as in mlx-lm's
qwen3_5, so that weights can be handed over. Qwen3-Next differs in how its file packs two projections.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU

from mtp_mlx.cache import MAX_BLOCK, Cache, KeyValueCache, RecurrentCache, full_cache
from mtp_mlx.memory import Layout, Recurrence, Rows, Traffic, kv_bytes
from mtp_mlx.models import base, parts
from mtp_mlx.types import Mask, Output, PlainRows, Span, Visible

LINEAR = "linear_attention"
FULL = "full_attention"
L2_EPS = 1e-6  # of the keys' and queries' length; no config names it

_MAY_BE_ZERO = {
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "mtp_num_hidden_layers",
}
# What a config may say without changing the network, the default first.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attn_output_gate": (True,),
    "attention_bias": (False, None),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "mamba_ssm_dtype": ("float32", None),
    "output_gate_type": ("swish", None),
}
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # those whose angles depend on the position alone


@dataclass(frozen=True)
class TextConfig:
    """The text part of a Qwen 3.5 config."""

    hidden_size: int
    intermediate_size: int  # 0 in a mixture of experts
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    layer_types: tuple[str, ...]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rope: Mapping[str, Any]
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    num_experts: int  # 0 in a dense model
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    mtp_num_hidden_layers: int  # what the config promises; whether the tensors are there is another question

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TextConfig":
        """Read a config.json, with or without a nested `text_config`.

        Raises KeyError with the name of a key that has no default, ValueError for what cannot be computed.
        """
        text: Mapping[str, Any] = config.get("text_config") or config
        if not isinstance(text, Mapping):
            raise ValueError(f"text_config is {text!r}, expected an object")
        base.check_choices(text, _ONLY)
        experts = text.get("num_experts") or 0
        return cls(
            hidden_size=text["hidden_size"],
            intermediate_size=text.get("intermediate_size") or 0,
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            layer_types=_layer_types(text),
            linear_num_key_heads=text["linear_num_key_heads"],
            linear_num_value_heads=text["linear_num_value_heads"],
            linear_key_head_dim=text["linear_key_head_dim"],
            linear_value_head_dim=text["linear_value_head_dim"],
            linear_conv_kernel_dim=text.get("linear_conv_kernel_dim", 4),
            rope=_rope(text),
            max_position_embeddings=text.get("max_position_embeddings", 262_144),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)),
            num_experts=experts,
            num_experts_per_tok=text["num_experts_per_tok"] if experts else 0,
            moe_intermediate_size=text["moe_intermediate_size"] if experts else 0,
            shared_expert_intermediate_size=text["shared_expert_intermediate_size"] if experts else 0,
            mtp_num_hidden_layers=text.get("mtp_num_hidden_layers") or 0,
        )

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no network can be built from."""
        base.check_numbers(vars(self), fields(self), _MAY_BE_ZERO)
        if self.linear_conv_kernel_dim < 2:
            raise ValueError(f"linear_conv_kernel_dim is {self.linear_conv_kernel_dim}, expected at least 2")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} KV heads")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"{self.linear_num_value_heads} linear value heads cannot share {self.linear_num_key_heads} key heads"
            )
        if self.num_experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}, with {self.num_experts} experts")
        needed = ["moe_intermediate_size", "shared_expert_intermediate_size"]
        for name in needed if self.num_experts else ["intermediate_size"]:
            if not vars(self)[name]:
                raise ValueError(f"{name} is missing or 0, with {self.num_experts} experts")
        base.check_positive("rms_norm_eps", self.rms_norm_eps)
        turned = self.rotary_size
        if not (0 < turned <= self.head_dim and turned % 2 == 0):
            raise ValueError(f"partial_rotary_factor turns {turned} of {self.head_dim} values of a head")

    @property
    def rotary_size(self) -> int:
        """How many values of an attention head are turned by their position."""
        return int(self.head_dim * self.rope["partial_rotary_factor"])

    @property
    def key_width(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim


def _layer_types(text: Mapping[str, Any]) -> tuple[str, ...]:
    count = text["num_hidden_layers"]
    given = text.get("layer_types")
    if given is None:
        interval = text.get("full_attention_interval", 4)
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"full_attention_interval is {interval!r}, expected a whole number of at least 1")
        given = [LINEAR if (i + 1) % interval else FULL for i in range(count)]
    kinds = (LINEAR, FULL)
    known = isinstance(given, list) and len(given) == count and all(kind in kinds for kind in given)
    if not known or not all(kind in given for kind in kinds):
        raise ValueError(f"layer_types must be {count} times {LINEAR} or {FULL}, each at least once")
    return tuple(given)


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the rotary embedding. Older files have two of its entries beside it, newer ones in it."""
    table = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(table, dict):
        raise ValueError(f"rope_parameters is {table!r}, expected an object")
    rope = {name: text[name] for name in ("rope_theta", "partial_rotary_factor") if name in text} | table
    base.check_positive("rope_theta", rope["rope_theta"])
    base.check_positive("partial_rotary_factor", rope.setdefault("partial_rotary_factor", 0.25))
    kind = rope.get("type") or rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}, only {', '.join(_ROPE_TYPES)} can be computed")
    return rope


class Stored(NamedTuple):
    """Rows in a cache, and who may see them."""

    rows: PlainRows
    mask: mx.array  # (B, 1, 1, S)


def fresh_rows(rows: list[PlainRows]) -> PlainRows:
    """Rows of single tokens in one piece, (B, H, j, head size)."""
    return PlainRows(
        mx.concatenate([row.keys for row in rows], axis=2), mx.concatenate([row.values for row in rows], axis=2)
    )


class Attention(nn.Module):
    """Grouped-query attention, its output gated, positions turned into a part of each head only."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.head_size = config.head_dim
        self.scale = config.head_dim**-0.5
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.total: parts.Total = parts.alone
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        # Each head's query and gate lie side by side.
        self.q_proj = nn.Linear(width, 2 * query_width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self._rope = initialize_rope(
            config.rotary_size,
            base=config.rope["rope_theta"],
            traditional=False,
            scaling_config=dict(config.rope),
            max_position_embeddings=config.max_position_embeddings,
        )

    def keys_and_values(self, x: mx.array, span: Span) -> PlainRows:
        """The block's own rows, (B, H, L, head size), ready for the cache."""
        keys = self.k_norm(base.split_heads(self.k_proj(x), self.head_size)).swapaxes(1, 2)
        values = base.split_heads(self.v_proj(x), self.head_size).swapaxes(1, 2)
        return PlainRows(self._rope(keys, offset=span.start), values)

    def __call__(self, x: mx.array, visible: Visible, mask: Mask, span: Span) -> mx.array:
        queries, gate = self._queries(x, span)
        out = visible.attend(queries, self.scale, mask)
        return self._gated(out, gate)

    def beside(self, x: mx.array, stored: Stored | None, fresh: list[PlainRows], span: Span) -> mx.array:
        """One token that sees stored rows, and rows (B, H, 1, head size) that stay out of the cache.

        The scores of both go through one softmax, so that neither has to be copied behind the other.
        """
        queries, gate = self._queries(x, span)
        B, heads, _, size = queries.shape
        keys, values = fresh_rows(fresh)
        grouped = queries.reshape(B, keys.shape[1], -1, size) * self.scale  # (B, H, heads / H, head size)
        scores = (grouped @ keys.swapaxes(-1, -2)).astype(mx.float32)
        if stored is None:
            out = mx.softmax(scores, axis=-1).astype(x.dtype) @ values
        else:
            before = (grouped @ stored.rows.keys.swapaxes(-1, -2)).astype(mx.float32)
            before = mx.where(stored.mask, before, -mx.inf)
            weights = mx.softmax(mx.concatenate([before, scores], axis=-1), axis=-1).astype(x.dtype)
            far, near = mx.split(weights, [before.shape[-1]], axis=-1)
            out = far @ stored.rows.values + near @ values
        return self._gated(out.reshape(B, heads, 1, size), gate)

    def _queries(self, x: mx.array, span: Span) -> tuple[mx.array, mx.array]:
        """Queries (B, heads, L, head size), and the gate of what they find."""
        B, L, _ = x.shape
        queries, gate = mx.split(self.q_proj(x).reshape(B, L, self.heads, -1), 2, axis=-1)
        return self._rope(self.q_norm(queries).swapaxes(1, 2), offset=span.start), gate.reshape(B, L, -1)

    def _gated(self, out: mx.array, gate: mx.array) -> mx.array:
        return self.total(self.o_proj(out.swapaxes(1, 2).reshape(gate.shape) * mx.sigmoid(gate)))

    def share(self, part: parts.Part) -> None:
        """Keep one machine's heads."""
        own = part.heads(self.heads, self.kv_heads, self.head_size, self.o_proj)
        if own is None:
            return
        parts.keep_rows(self.q_proj, parts.times(own.queries, 2 * self.head_size))
        parts.keep_columns(self.o_proj, parts.times(own.queries, self.head_size))
        for matrix in (self.k_proj, self.v_proj):
            parts.keep_rows(matrix, parts.times(own.keys, self.head_size))
        self.heads, self.kv_heads, self.total = len(own.queries), len(own.keys), part.total


class GatedRMSNorm(nn.Module):
    """Norm, then a gate; the only norm of the family whose weight is stored as it is applied."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = mx.ones((width,))
        self.eps = eps

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        y = mx.fast.rms_norm(x, self.weight, self.eps).astype(mx.float32)
        return (nn.silu(gate.astype(mx.float32)) * y).astype(x.dtype)


class GatedDeltaNet(nn.Module):
    """Linear attention with a state that decays and is corrected (Yang et al. 2024, arXiv 2412.06464)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width, self.key_width, value_width = config.hidden_size, config.key_width, config.value_width
        self.key_size, self.value_size = config.linear_key_head_dim, config.linear_value_head_dim
        channels, heads = 2 * self.key_width + value_width, config.linear_num_value_heads
        self.total: parts.Total = parts.alone
        self.in_proj_qkv = nn.Linear(width, channels, bias=False)
        self.in_proj_z = nn.Linear(width, value_width, bias=False)
        self.in_proj_b = nn.Linear(width, heads, bias=False)
        self.in_proj_a = nn.Linear(width, heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.dt_bias = mx.ones((heads,))
        self.A_log = mx.zeros((heads,))
        self.norm = GatedRMSNorm(self.value_size, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(value_width, width, bias=False)

    def __call__(self, x: mx.array, cache: RecurrentCache) -> mx.array:
        B, L, _ = x.shape
        mixed = nn.silu(self.conv1d(cache.extend(self.in_proj_qkv(x))))  # (B, L, C)
        queries, keys, values = mx.split(mixed, [self.key_width, 2 * self.key_width], axis=-1)
        queries, keys = self._unit(queries), self._unit(keys)
        decay = mx.exp(-mx.exp(self.A_log.astype(mx.float32)) * nn.softplus(self.in_proj_a(x) + self.dt_bias))
        read = cache.recur(
            queries * self.key_size**-0.5,
            keys,
            base.split_heads(values, self.value_size),
            decay,  # (B, L, Hv)
            mx.sigmoid(self.in_proj_b(x)),
        )
        gated = self.norm(read, base.split_heads(self.in_proj_z(x), self.value_size))
        return self.total(self.out_proj(gated.reshape(B, L, -1)))

    @property
    def heads(self) -> int:
        """Value heads."""
        return self.A_log.size

    @property
    def recurrence(self) -> Recurrence:
        """What its cache holds."""
        value_width = self.heads * self.value_size
        channels = 2 * self.key_width + value_width
        return Recurrence(
            state=value_width * self.key_size,
            tail=(self.conv1d.weight.shape[1] - 1) * channels,
            row=channels + self.key_width + value_width + self.heads,
            exact_row=self.heads,
        )

    def share(self, part: parts.Part) -> None:
        """Keep one machine's key heads, each with the value heads that belong to it."""
        groups = self.key_width // self.key_size
        shared = self.heads // groups  # value heads of a key head
        step = parts.packed(self.out_proj) // math.gcd(parts.packed(self.out_proj), shared * self.value_size)
        own = part.of(groups, step)
        if own is None:
            return
        heads = parts.times(own, shared)
        keys, values = parts.times(own, self.key_size), parts.times(heads, self.value_size)
        joined = keys, parts.moved(keys, self.key_width), parts.moved(values, 2 * self.key_width)
        parts.keep_rows(self.in_proj_qkv, *joined)
        self.conv1d.weight = parts.cut(self.conv1d.weight, 0, *joined)
        self.conv1d.groups = self.conv1d.weight.shape[0]
        parts.keep_rows(self.in_proj_z, values)
        for matrix in (self.in_proj_a, self.in_proj_b):
            parts.keep_rows(matrix, heads)
        self.A_log, self.dt_bias = parts.cut(self.A_log, 0, heads), parts.cut(self.dt_bias, 0, heads)
        parts.keep_columns(self.out_proj, values)
        self.key_width, self.total = len(keys), part.total

    def _unit(self, x: mx.array) -> mx.array:
        """Heads of length 1. The norm divides by the root of a mean and adds its eps there, hence the two factors."""
        size = self.key_size
        return mx.fast.rms_norm(base.split_heads(x, size), None, L2_EPS / size) * size**-0.5


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return y

    @property
    def parts(self) -> list[nn.Module]:
        """What has channels of its own, and can be shared out."""
        return [self]


class SparseMLP(nn.Module):
    """A few of many experts, and one that sees every token."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width = config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(width, config.num_experts, bias=False)
        self.switch_mlp = SwitchGLU(width, config.moe_intermediate_size, config.num_experts, bias=False)
        self.shared_expert = MLP(width, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.gate(x), axis=-1, precise=True)  # (B, L, E)
        chosen = mx.argpartition(scores, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        routed = (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)
        return routed + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    @property
    def parts(self) -> list[nn.Module]:
        return [self.switch_mlp, self.shared_expert]


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, kind: str):
        super().__init__()
        if kind == FULL:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        sparse = config.num_experts > 0
        self.mlp = SparseMLP(config) if sparse else MLP(config.hidden_size, config.intermediate_size)
        self.total: parts.Total = parts.alone

    def attend(self, h: mx.array, cache: KeyValueCache, mask: Mask, span: Span) -> mx.array:
        """A layer of attention, (B, L, D)."""
        x = self.input_layernorm(h)
        visible = cache.write(*self.self_attn.keys_and_values(x, span), span)
        return self._feed_forward(h + self.self_attn(x, visible, mask, span))

    def attend_beside(self, h: mx.array, stored: Stored | None, fresh: list[PlainRows], span: Span) -> mx.array:
        """A layer of attention for one token, (B, 1, D), whose keys and values join `fresh` and not the cache."""
        x = self.input_layernorm(h)
        fresh.append(self.self_attn.keys_and_values(x, span))
        return self._feed_forward(h + self.self_attn.beside(x, stored, fresh, span))

    def recur(self, h: mx.array, cache: RecurrentCache) -> mx.array:
        """A layer of linear attention, (B, L, D)."""
        return self._feed_forward(h + self.linear_attn(self.input_layernorm(h), cache))

    def _feed_forward(self, h: mx.array) -> mx.array:
        return h + self.total(self.mlp(self.post_attention_layernorm(h)))

    def share(self, part: parts.Part) -> None:
        """Keep one machine's heads, and its channels of the MLP and of every expert."""
        (self.self_attn if "self_attn" in self else self.linear_attn).share(part)
        self.total = parts.keep_inner(part, *self.mlp.parts)


class TextModel(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, kind) for kind in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: Cache, span: Span) -> mx.array:
        kinds = self.config.layer_types
        h = self.embed_tokens(tokens)
        mask = cache.attention(kinds.index(FULL)).mask(span)
        for i, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            full = kind == FULL
            h = layer.attend(h, cache.attention(i), mask, span) if full else layer.recur(h, cache.recurrent(i))
        return self.norm(h)


class Model(nn.Module):
    """The target: one pass gives the logits and the hidden after the final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
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
        """What its cache holds."""
        size, layers = self.config.head_dim, zip(self.layers, self.config.layer_types, strict=True)
        return tuple(
            Rows(layer.self_attn.kv_heads, size) if kind == FULL else layer.linear_attn.recurrence
            for layer, kind in layers
        )

    @property
    def traffic(self) -> Traffic:
        return Traffic(
            self.config.num_experts_per_tok, "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        )

    def kv_bytes(self, tokens: int, kv_bits: int | None = None) -> int:
        return kv_bytes(self.layout, tokens, kv_bits, self.model.norm.weight.dtype.size, MAX_BLOCK)

    def make_cache(self, kv_bits: int | None = None) -> Cache:
        size, kernel = self.config.head_dim, self.config.linear_conv_kernel_dim
        kinds = self.config.layer_types
        return Cache([full_cache(size, kv_bits) if kind == FULL else RecurrentCache(kernel) for kind in kinds])

    def embed(self, tokens: mx.array) -> mx.array:
        """Token embeddings, (B, L) -> (B, L, D)."""
        return self.model.embed_tokens(tokens)

    def logits(self, hidden: mx.array) -> mx.array:
        """The output head, (B, L, D) -> (B, L, V); the mtp head uses it too."""
        return self.model.embed_tokens.as_linear(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)

    def __call__(self, tokens: mx.array, cache: Cache, span: Span) -> Output:
        hidden = self.model(tokens, cache, span)
        return Output(self.logits(hidden), hidden)

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Parameters of this model out of a checkpoint's tensors: text only, in MLX's layout, norms as applied.

        Raises ValueError for a file that mixes layouts.
        """
        raw = is_raw(weights)
        renamed = {base.rename(name): array for name, array in weights.items()}
        needed = {name: array for name, array in renamed.items() if not _is_ballast(name, self.config)}
        kept: dict[str, mx.array] = {}
        for name, array in base.stack_experts(needed, "switch_mlp").items():
            for part, value in _unpacked(name, array, self.config):
                kept[part] = _as_applied(part, value) if raw else value
        return kept


class Shaped(Protocol):
    """An array, or what a header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def is_raw(weights: Mapping[str, Shaped]) -> bool | None:
    """Whether a target's tensors are laid out as released, None without any that tell.

    Released files hold the convolution as (C, 1, kernel) and norms as the difference from 1; MLX's hold it as
    (C, kernel, 1) and norms as they are applied. Whoever transposes the one shifts the others in the same pass.
    Raises ValueError where both layouts occur.
    """
    found = {array.shape[-1] != 1 for name, array in weights.items() if name.endswith("linear_attn.conv1d.weight")}
    if len(found) > 1:
        raise ValueError("its conv1d tensors are laid out partly as released and partly as MLX does")
    return found.pop() if found else None


# The norms of a target that are stored as a difference from 1; linear_attn.norm is not.
_SHIFTED = re.compile(r"(^model\.norm|input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm)\.weight$")


def _as_applied(name: str, array: mx.array) -> mx.array:
    if name.endswith("conv1d.weight"):
        return array.swapaxes(1, 2)
    return array + 1 if _SHIFTED.search(name) else array


def _is_ballast(name: str, config: TextConfig) -> bool:
    """Tensors that some checkpoints carry and the target does not need."""
    parts = name.split(".")
    if parts[0] == "lm_head":
        return config.tie_word_embeddings
    return "mtp" in parts or parts[0] in ("visual", "vision_tower") or parts[:2] == ["model", "visual"]


def _unpacked(name: str, array: mx.array, config: TextConfig) -> Iterator[tuple[str, mx.array]]:
    """Parts of a tensor that a file packs together."""
    packed = re.fullmatch(r"(.*linear_attn\.)in_proj_(qkvz|ba)\.(\w+)", name)
    if packed is None:
        yield from base.split_experts(name, array, "switch_mlp")
        return
    # Qwen3-Next: rows in groups, one for each key head with the value heads that belong to it.
    shared = config.linear_num_value_heads // config.linear_num_key_heads
    groups = array.reshape(config.linear_num_key_heads, -1, array.shape[-1])
    rows = lambda part: part.reshape(-1, array.shape[-1])  # noqa: E731
    if packed[2] == "qkvz":
        size, width = config.linear_key_head_dim, shared * config.linear_value_head_dim
        q, k, v, z = mx.split(groups, [size, 2 * size, 2 * size + width], axis=1)
        yield f"{packed[1]}in_proj_qkv.{packed[3]}", mx.concatenate([rows(q), rows(k), rows(v)])
        yield f"{packed[1]}in_proj_z.{packed[3]}", rows(z)
    else:
        b, a = mx.split(groups, 2, axis=1)
        yield f"{packed[1]}in_proj_b.{packed[3]}", rows(b)
        yield f"{packed[1]}in_proj_a.{packed[3]}", rows(a)
