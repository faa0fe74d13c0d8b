"""Gemma 4 text model and its assistant in plain torch, with the released parameter names.

Folded attention makes it faster to train on a CPU than transformers' classes; `checkpoint.py` proves that
both give the same logits.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

# By layer type:
KV = dict[str, tuple[Tensor, Tensor]]  # K and V, each (B, 1, L, head)
Ropes = dict[str, tuple[Tensor, Tensor]]  # cos and sin, each (L, head)
Masks = dict[str, Tensor]  # to add to scores: (L, S), or by blocks (n, W, 2W)

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a text model; the defaults are the demo target's."""

    vocab: int = 4096
    width: int = 256
    mlp: int = 1024
    layers: tuple[str, ...] = (SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL)
    shared: int = 2  # last layers, which read the K/V of earlier ones
    ple: int = 32  # width of per-layer inputs
    heads: int = 4
    head: int = 64  # head width of sliding layers
    global_head: int = 128
    window: int = 128
    softcap: float | None = 30.0

    def head_of(self, kind: str) -> int:
        return self.head if kind == SLIDING else self.global_head


TARGET = Sizes()
ASSISTANT = Sizes(width=160, mlp=480, layers=(SLIDING, FULL), shared=2, ple=0, softcap=None)


class Norm(nn.Module):
    """RMSNorm in fp32, with a plain (not 1 + w) weight or none."""

    def __init__(self, width: int, *, scaled: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y if self.weight is None else y * self.weight).to(x.dtype)


def rope_table(positions: Tensor, kind: str, head: int) -> tuple[Tensor, Tensor]:
    """cos and sin (L, head) for absolute positions; full layers turn a quarter of the pairs."""
    if kind == SLIDING:
        frequency = 10_000.0 ** (-torch.arange(0, head, 2).float() / head)
    else:
        turned = int(0.25 * head // 2)
        frequency = torch.zeros(head // 2)
        frequency[:turned] = 1_000_000.0 ** (-torch.arange(0, 2 * turned, 2).float() / head)
    angle = positions.float()[..., None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to x (..., L, head)."""
    cos, sin = rope
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, L, d) on k, v (B, S, d), mask (L, S) or (B, 1, L, S).

    One K/V head lets all query heads fold into one matrix product: on a CPU twice as fast as torch's SDPA.
    """
    B, H, L, d = q.shape
    scores = (q.reshape(B, H * L, d) @ k.transpose(1, 2)).view(B, H, L, -1) + mask
    p = torch.softmax(scores.float(), -1).to(q.dtype)
    return (p.view(B, H * L, -1) @ v).view(B, H, L, d)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Sliding attention by blocks: mask (n, W, 2W) shows W queries their own keys and the W before."""
    B, H, L, d = q.shape
    n, W, _ = mask.shape
    q = q.reshape(B, H, n, W, d).transpose(1, 2).reshape(B * n, H, W, d)

    def pairs(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, W, 0)).view(B, n + 1, W, d)
        return torch.cat([x[:, :-1], x[:, 1:]], 2).view(B * n, 2 * W, d)

    out = attend_all(q, pairs(k), pairs(v), mask[:, None].repeat(B, 1, 1, 1))
    return out.view(B, n, H, W, d).transpose(1, 2).reshape(B, H, L, d)


class Attention(nn.Module):
    """Attention with q_norm and k_norm and scale 1; without own K/V where it reads those of another layer."""

    def __init__(self, sizes: Sizes, kind: str, *, shared: bool) -> None:
        super().__init__()
        self.heads, self.head = sizes.heads, sizes.head_of(kind)
        self.q_proj = nn.Linear(sizes.width, self.heads * self.head, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head, sizes.width, bias=False)
        self.q_norm = Norm(self.head)
        self.shared = shared
        if not shared:
            self.k_proj = nn.Linear(sizes.width, self.head, bias=False)
            self.v_proj = nn.Linear(sizes.width, self.head, bias=False)
            self.k_norm = Norm(self.head)
            self.v_norm = Norm(self.head, scaled=False)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """K and V of x, each (B, 1, L, head)."""
        k = rotate(self.k_norm(self.k_proj(x)), rope)
        return k[:, None], self.v_norm(self.v_proj(x))[:, None]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        B, L, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, L, self.heads, self.head)).transpose(1, 2)
        q = rotate(q, rope)
        attend = attend_blocks if mask.ndim == 3 else attend_all
        out = attend(q, *(t[:, 0].to(q.dtype) for t in kv), mask.to(q.dtype))
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.width, sizes.mlp, bias=False)
        self.up_proj = nn.Linear(sizes.width, sizes.mlp, bias=False)
        self.down_proj = nn.Linear(sizes.mlp, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, kind: str, *, shared: bool) -> None:
        super().__init__()
        self.kind = kind
        self.self_attn = Attention(sizes, kind, shared=shared)
        self.mlp = MLP(sizes)
        self.input_layernorm = Norm(sizes.width)
        self.post_attention_layernorm = Norm(sizes.width)
        self.pre_feedforward_layernorm = Norm(sizes.width)
        self.post_feedforward_layernorm = Norm(sizes.width)
        self.layer_scalar = nn.Parameter(torch.ones(1))
        if sizes.ple:
            self.per_layer_input_gate = nn.Linear(sizes.width, sizes.ple, bias=False)
            self.per_layer_projection = nn.Linear(sizes.ple, sizes.width, bias=False)
            self.post_per_layer_input_norm = Norm(sizes.width)

    def forward(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        kv: tuple[Tensor, Tensor],
        mask: Tensor,
        ple: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        """One layer on h, given its normed input x and the K/V to read."""
        h = h + self.post_attention_layernorm(self.self_attn(x, rope, kv, mask))
        h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        if ple is not None:
            gated = F.gelu(self.per_layer_input_gate(h), approximate="tanh") * ple
            h = h + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return h * self.layer_scalar


class Past:
    """K/V of the tokens read so far, in buffers of a fixed length."""

    def __init__(self, capacity: int, window: int) -> None:
        self.capacity, self.window, self.length = capacity, window, 0
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, kind: str, kv: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep a block's K/V of one layer and return all that the block may look at."""
        if layer not in self.buffers:
            shape = list(kv[0].shape)
            shape[2] = self.capacity
            self.buffers[layer] = (kv[0].new_empty(shape), kv[0].new_empty(shape))
        end = self.length + kv[0].shape[2]
        for buffer, rows in zip(self.buffers[layer], kv, strict=True):
            buffer[:, :, self.length : end] = rows
        k, v = (buffer[:, :, self.first(kind, kv[0].shape[2]) : end] for buffer in self.buffers[layer])
        return k, v

    def first(self, kind: str, block: int) -> int:
        """The first key that a block of tokens may look at."""
        return max(0, self.length + 1 - self.window) if kind == SLIDING and block == 1 else 0

    def masks(self, block: int) -> Masks:
        """The masks for the next block of tokens."""
        full = target_masks(self.length + block, self.window)
        return {kind: mask[self.length :, self.first(kind, block) :] for kind, mask in full.items()}


class Target(nn.Module):
    """The Gemma 4 text model with a tied head."""

    def __init__(self, sizes: Sizes = TARGET) -> None:
        super().__init__()
        self.sizes = sizes
        depth = len(sizes.layers)
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.width)
        self.layers = nn.ModuleList(
            Layer(sizes, kind, shared=i >= depth - sizes.shared) for i, kind in enumerate(sizes.layers)
        )
        self.norm = Norm(sizes.width)
        self.embed_tokens_per_layer = nn.Embedding(sizes.vocab, depth * sizes.ple)
        self.per_layer_model_projection = nn.Linear(sizes.width, depth * sizes.ple, bias=False)
        self.per_layer_projection_norm = Norm(sizes.ple)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids) * math.sqrt(self.sizes.width)

    def per_layer_inputs(self, ids: Tensor, x: Tensor) -> Tensor:
        """(B, L, layers, ple), from the token's own table and from its scaled embedding x."""
        shape = (*ids.shape, len(self.sizes.layers), self.sizes.ple)
        token = (self.embed_tokens_per_layer(ids) * math.sqrt(self.sizes.ple)).view(shape)
        context = (self.per_layer_model_projection(x) * self.sizes.width**-0.5).view(shape)
        return (self.per_layer_projection_norm(context) + token) * 2**-0.5

    def forward(self, ids: Tensor, ropes: Ropes, masks: Masks, past: "Past | None" = None) -> tuple[Tensor, KV]:
        """Post-norm hidden (B, L, D) and the K/V that the assistant reads (the last of each layer type).

        `past` keeps the K/V of earlier calls: cached decoding. Its masks are then those of `Past`.
        """
        h = self.embed(ids)
        ple = self.per_layer_inputs(ids, h)
        kv: KV = {}
        for i, layer in enumerate(self.layers):
            x = layer.input_layernorm(h)
            kind = layer.kind
            if not layer.self_attn.shared:
                kv[kind] = layer.self_attn.keys_values(x, ropes[kind])
                if past is not None:
                    kv[kind] = past.store(i, kind, kv[kind])
            h = layer(h, ropes[kind], kv[kind], masks[kind], ple[:, :, i], x)
        if past is not None:
            past.length += ids.shape[1]
        return self.norm(h), kv

    def head(self, hidden: Tensor) -> Tensor:
        """Softcapped logits (..., V)."""
        logits = F.linear(hidden, self.embed_tokens.weight).float()
        cap = self.sizes.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class AssistantModel(nn.Module):
    """The assistant's layers; its embedding table serves only as its head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes, kind, shared=True) for kind in sizes.layers)
        self.norm = Norm(sizes.width)


class Assistant(nn.Module):
    """Gemma 4's drafter: reads the target's K/V, never writes any."""

    def __init__(self, backbone: int = TARGET.width, sizes: Sizes = ASSISTANT) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = AssistantModel(sizes)
        self.pre_projection = nn.Linear(2 * backbone, sizes.width, bias=False)
        self.post_projection = nn.Linear(sizes.width, backbone, bias=False)

    def forward(
        self,
        embedded: Tensor,
        h: Tensor,
        ropes: Ropes,
        kv: KV,
        masks: Masks,
        rows: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """One draft step from the target's scaled embedding of the last token and the hidden before it.

        Returns logits (B, rows, V) of the positions asked for and the next step's hidden (B, L, backbone).
        """
        x = self.pre_projection(torch.cat([embedded, h.to(embedded.dtype)], -1))
        for layer in self.model.layers:
            kind = layer.kind
            x = layer(x, ropes[kind], kv[kind], masks[kind], None, layer.input_layernorm(x))
        n = self.model.norm(x)
        return F.linear(n[:, rows], self.model.embed_tokens.weight).float(), self.post_projection(n)


def ropes_at(positions: Tensor, sizes: Sizes) -> Ropes:
    """The rope tables of both layer types."""
    return {kind: rope_table(positions, kind, sizes.head_of(kind)) for kind in (SLIDING, FULL)}


def additive(visible: Tensor) -> Tensor:
    """A mask to add to attention scores."""
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


def target_masks(length: int, window: int) -> Masks:
    """Causal masks (L, L); a sliding query sees `window` keys, its own among them."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return {SLIDING: additive((j <= i) & (j > i - window)), FULL: additive(j <= i)}


def training_masks(length: int, window: int) -> Masks:
    """The same masks, the sliding one by blocks of `window` queries; `length` is a multiple of it."""
    blocks = length // window
    i, j = torch.arange(window)[:, None] + window, torch.arange(2 * window)[None]
    visible = ((j <= i) & (j > i - window)).repeat(blocks, 1, 1)
    visible[0] &= j >= window  # nothing stands before the first block
    return {SLIDING: additive(visible), FULL: target_masks(length, window)[FULL]}


def draft_masks(first: int, length: int, window: int) -> Masks:
    """Masks (length - first, length) for draft positions P = first..length-1.

    A draft sees committed keys only: all j < P, or the last `window` of them.
    """
    p, j = torch.arange(first, length)[:, None], torch.arange(length)[None]
    return {SLIDING: additive((j < p) & (j >= p - window)), FULL: additive(j < p)}


def draft_training_masks(length: int, window: int) -> Masks:
    """The same for P = 0..length-1, the sliding one by blocks. Position 0, where nothing is visible, sees
    an arbitrary key to keep the softmax finite; its output must not be used.
    """
    i, j = torch.arange(window)[:, None] + window, torch.arange(2 * window)[None]
    blocks = ((j < i) & (j >= i - window)).repeat(length // window, 1, 1)
    blocks[0] &= j >= window
    blocks[0, 0, window] = True
    p, key = torch.arange(length)[:, None], torch.arange(length)[None]
    return {SLIDING: additive(blocks), FULL: additive((key < p) | ((p == 0) & (key == 0)))}


def initialise(model: nn.Module, seed: int) -> None:
    """Matrices by fan-in; tables so that scaled embeddings have about unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "embed_tokens_per_layer" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
        elif parameter.ndim == 2:
            parameter.data.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
