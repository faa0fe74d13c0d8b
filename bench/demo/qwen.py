"""Qwen 3.5 text model and its multi-token prediction head in plain torch, with the released parameter names.

The gated delta rule runs in chunks, so that training is made of matrix products; `checkpoint.py` proves that it and
transformers' classes give the same logits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]  # cos and sin, each (L, turned)
KV = tuple[Tensor, Tensor]  # K and V, each (B, KV heads, L, head)

LINEAR, FULL = "linear_attention", "full_attention"
TABLE = 0.25  # standard deviation of the embedding at first
CHUNK = 64  # tokens that the delta rule handles by matrix products


@dataclass(frozen=True)
class Sizes:
    """Sizes of the demo model; its head has one layer of the full kind."""

    vocab: int = 4096
    width: int = 256
    mlp: int = 768
    layers: tuple[str, ...] = (LINEAR, LINEAR, LINEAR, FULL) * 2
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    turned: int = 16  # of the head's width, by RoPE
    theta: float = 1e7
    linear_k_heads: int = 2
    linear_v_heads: int = 4
    linear_head: int = 64  # width of keys and of values
    kernel: int = 4

    @property
    def linear_k(self) -> int:
        return self.linear_k_heads * self.linear_head

    @property
    def linear_v(self) -> int:
        return self.linear_v_heads * self.linear_head


SIZES = Sizes()


class Norm(nn.Module):
    """RMSNorm in fp32; the weight is stored as its distance from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight)).to(x.dtype)


class GatedNorm(nn.Module):
    """RMSNorm with a plain weight, then a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * y * F.silu(z.float())).to(z.dtype)


class Conv(nn.Module):
    """Causal convolution of every channel with its own kernel."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, kernel - 1 + L, C), the rows before the first included, to (B, L, C)."""
        kernel = self.weight.shape[2]
        L = x.shape[1] - kernel + 1
        return sum((x[:, i : i + L] * self.weight[:, 0, i] for i in range(1, kernel)), x[:, :L] * self.weight[:, 0, 0])


def rope_table(positions: Tensor, sizes: Sizes = SIZES) -> Rope:
    """cos and sin (L, turned) for positions."""
    frequency = sizes.theta ** (-torch.arange(0, sizes.turned, 2).float() / sizes.turned)
    angle = positions.float()[..., None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Apply RoPE to the first dimensions of x (..., L, head)."""
    cos, sin = rope
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = turned.chunk(2, -1)
    return torch.cat([(turned * cos + torch.cat([-right, left], -1) * sin).to(x.dtype), rest], -1)


def unit(x: Tensor) -> Tensor:
    """x over its length."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def delta_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the gated delta rule: q, k, v (B, N, d), g and beta (B, N), state (B, N, dk, dv)."""
    state = state * g.exp()[..., None, None]
    change = beta[..., None] * (v - (k[..., None, :] @ state).squeeze(-2))
    state = state + k[..., None] * change[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def delta_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same for L tokens: q, k, v (B, N, L, d), g and beta (B, N, L).

    Within a chunk every change is a triangular system in those before it (Yang et al. 2024, arXiv 2412.06464), whose
    solution is affine in the state before the chunk. So one state follows from another by one matrix product, and
    all else is done for all chunks at once.
    """
    B, N, L, D = q.shape
    q, k, v = (F.pad(x, (0, 0, 0, -L % CHUNK)).view(B, N, -1, CHUNK, D) for x in (q, k, v))
    g, beta = (F.pad(x, (0, -L % CHUNK)).view(B, N, -1, CHUNK) for x in (g, beta))
    g = g.cumsum(-1)
    decay = (g[..., :, None] - g[..., None, :]).tril().exp().tril()  # from the column's token to the row's
    kb = k * beta[..., None]
    system = ((kb @ k.mT) * decay).tril(-1)
    right = torch.cat([v * beta[..., None], kb * g.exp()[..., None]], -1)
    own, read = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).chunk(2, -1)
    kd = (k * (g[..., -1:] - g).exp()[..., None]).mT
    keep = torch.diag_embed(g[..., -1:].exp().expand(B, N, -1, D)) - kd @ read
    add = kd @ own
    states = []
    for i in range(keep.shape[2]):
        states.append(state)
        state = keep[:, :, i] @ state + add[:, :, i]
    before = torch.stack(states, 2)
    out = (q * g.exp()[..., None]) @ before + ((q @ k.mT) * decay) @ (own - read @ before)
    return out.view(B, N, -1, D)[:, :, :L], state


class DeltaPast:
    """What a linear layer keeps of the tokens read: the last rows before the convolution, and the state."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # (B, kernel - 1, C)
        self.state: Tensor | None = None  # (B, N, dk, dv), fp32


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        channels = 2 * sizes.linear_k + sizes.linear_v
        self.in_proj_qkv = nn.Linear(sizes.width, channels, bias=False)
        self.in_proj_z = nn.Linear(sizes.width, sizes.linear_v, bias=False)
        self.in_proj_b = nn.Linear(sizes.width, sizes.linear_v_heads, bias=False)
        self.in_proj_a = nn.Linear(sizes.width, sizes.linear_v_heads, bias=False)
        self.conv1d = Conv(channels, sizes.kernel)
        self.A_log = nn.Parameter(torch.zeros(sizes.linear_v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(sizes.linear_v_heads))
        self.norm = GatedNorm(sizes.linear_head)
        self.out_proj = nn.Linear(sizes.linear_v, sizes.width, bias=False)

    def forward(self, x: Tensor, past: DeltaPast | None = None) -> Tensor:
        B, L, _ = x.shape
        qkv = self.in_proj_qkv(x)
        z = self.in_proj_z(x).view(B, L, -1, self.sizes.linear_head)
        before = self.sizes.kernel - 1
        first = past is None or past.rows is None
        rows = F.pad(qkv, (0, 0, before, 0)) if first else torch.cat([past.rows, qkv], 1)
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        beta = torch.sigmoid(self.in_proj_b(x).float())
        with torch.autocast("cpu", enabled=False):
            state = None if past is None else past.state
            out, state = self.recur(F.silu(self.conv1d(rows)).float(), g, beta, state)
        if past is not None:
            past.rows, past.state = rows[:, -before:], state
        return self.out_proj(self.norm(out, z).flatten(2))

    def recur(self, qkv: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs (B, L, N, dv) and the state after them, in fp32."""
        B, L, _ = qkv.shape
        D, K, N = self.sizes.linear_head, self.sizes.linear_k_heads, self.sizes.linear_v_heads
        q, k, v = qkv.split([K * D, K * D, N * D], -1)
        q = (unit(q.view(B, L, K, D)) * D**-0.5).repeat_interleave(N // K, 2)
        k = unit(k.view(B, L, K, D)).repeat_interleave(N // K, 2)
        v = v.view(B, L, N, D)
        if state is None:
            state = qkv.new_zeros(B, N, D, D)
        if L == 1:
            out, state = delta_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state)
            return out[:, None], state
        heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v, g, beta)]
        out, state = delta_chunks(*heads_first, state)
        return out.transpose(1, 2), state


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, L, d) on k, v (B, KV, S, d) under mask (L, S), added to the scores.

    The query heads of one K/V head fold into one matrix product: on a CPU twice as fast as torch's SDPA.
    """
    B, H, L, d = q.shape
    KV, S = k.shape[1:3]
    scores = (q.reshape(B, KV, -1, d) @ k.mT).view(B, H, L, S) * d**-0.5 + mask
    p = torch.softmax(scores.float(), -1).to(q.dtype)
    return (p.view(B, KV, -1, S) @ v).view(B, H, L, d)


class Attention(nn.Module):
    """Attention whose output every head gates."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.q_proj = nn.Linear(sizes.width, 2 * sizes.heads * sizes.head, bias=False)
        self.k_proj = nn.Linear(sizes.width, sizes.kv_heads * sizes.head, bias=False)
        self.v_proj = nn.Linear(sizes.width, sizes.kv_heads * sizes.head, bias=False)
        self.o_proj = nn.Linear(sizes.heads * sizes.head, sizes.width, bias=False)
        self.q_norm = Norm(sizes.head)
        self.k_norm = Norm(sizes.head)

    def queries(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Queries and gates, each (B, H, L, head)."""
        q, gate = self.q_proj(x).unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2).chunk(2, -1)
        return rotate(self.q_norm(q), rope), gate

    def keys_values(self, x: Tensor, rope: Rope) -> KV:
        k, v = (p(x).unflatten(-1, (self.sizes.kv_heads, -1)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        return rotate(self.k_norm(k), rope), v

    def output(self, out: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj((out * torch.sigmoid(gate)).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rope: Rope, mask: Tensor, past: "AttentionPast | None" = None) -> Tensor:
        q, gate = self.queries(x, rope)
        kv = self.keys_values(x, rope)
        k, v = kv if past is None else past.store(kv)
        return self.output(attend(q, k, v, mask.to(q.dtype)), gate)


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.width, sizes.mlp, bias=False)
        self.up_proj = nn.Linear(sizes.width, sizes.mlp, bias=False)
        self.down_proj = nn.Linear(sizes.mlp, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class AttentionPast:
    """K/V of the tokens read so far, in buffers of a fixed length."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.buffers: tuple[Tensor, ...] = ()

    def store(self, kv: KV) -> KV:
        """Keep a block's K/V and return all so far."""
        B, heads, L, d = kv[0].shape
        if not self.buffers:
            self.buffers = tuple(t.new_empty(B, heads, self.capacity, d) for t in kv)
        end = self.length + L
        for buffer, rows in zip(self.buffers, kv, strict=True):
            buffer[:, :, self.length : end] = rows
        self.length = end
        k, v = (buffer[:, :, :end] for buffer in self.buffers)
        return k, v


class Layer(nn.Module):
    """A decoder layer; only its attention is of one kind or the other."""

    def __init__(self, sizes: Sizes, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == LINEAR:
            self.linear_attn = GatedDeltaNet(sizes)
        else:
            self.self_attn = Attention(sizes)
        self.mlp = MLP(sizes)
        self.input_layernorm = Norm(sizes.width)
        self.post_attention_layernorm = Norm(sizes.width)

    def forward(self, h: Tensor, rope: Rope, mask: Tensor, past: "DeltaPast | AttentionPast | None") -> Tensor:
        x = self.input_layernorm(h)
        h = h + (self.linear_attn(x, past) if self.kind == LINEAR else self.self_attn(x, rope, mask, past))
        return h + self.mlp(self.post_attention_layernorm(h))


class Target(nn.Module):
    """The Qwen 3.5 text model with a tied head."""

    def __init__(self, sizes: Sizes = SIZES) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes, kind) for kind in sizes.layers)
        self.norm = Norm(sizes.width)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)

    def forward(self, ids: Tensor, rope: Rope, mask: Tensor, past: "Past | None" = None) -> Tensor:
        """Post-norm hidden (B, L, D); `past` keeps what later calls read of these tokens."""
        h = self.embed(ids)
        for i, layer in enumerate(self.layers):
            h = layer(h, rope, mask, None if past is None else past.layers[i])
        if past is not None:
            past.length += ids.shape[1]
        return self.norm(h)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V)."""
        return F.linear(hidden, self.embed_tokens.weight).float()


class Past:
    """What the layers keep of the tokens read so far."""

    def __init__(self, capacity: int, sizes: Sizes = SIZES) -> None:
        self.length = 0
        self.layers = [DeltaPast() if kind == LINEAR else AttentionPast(capacity) for kind in sizes.layers]

    def masks(self, block: int) -> Tensor:
        """The mask for the next block of tokens."""
        return additive(causal(self.length + block)[self.length :])


class Head(nn.Module):
    """The multi-token prediction head: one layer over pairs of a token and the target's hidden before it.

    Slot t holds the pair of token t+1 and the target's hidden of t; it predicts token t+2.
    """

    def __init__(self, sizes: Sizes = SIZES) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * sizes.width, sizes.width, bias=False)
        self.layers = nn.ModuleList([Layer(sizes, FULL)])
        self.norm = Norm(sizes.width)
        self.pre_fc_norm_embedding = Norm(sizes.width)
        self.pre_fc_norm_hidden = Norm(sizes.width)

    def forward(
        self, embedded: Tensor, h: Tensor, rope: Rope, mask: Tensor, pairs: KV | None, drafted: tuple[KV, ...]
    ) -> "Draft":
        """One draft step of every row (B, L): from the embedding of its last token and the hidden before it.

        Each row reads those of the true `pairs` (S of them) that mask (L, S) shows, and the pairs drafted in
        its own earlier steps. The first step makes the true pairs, and reads its own among them.
        """
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(h)], -1))
        (layer,) = self.layers
        attention, n = layer.self_attn, layer.input_layernorm(x)
        q, gate = attention.queries(n, rope)
        kv = attention.keys_values(n, rope)
        if pairs is None:
            pairs = kv
        else:
            drafted = (*drafted, kv)
        x = x + attention.output(attend_chain(q, pairs, drafted, mask.to(q.dtype)), gate)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return Draft(self.norm(x), pairs, drafted)


class Draft(NamedTuple):
    """What a draft step hands to the next."""

    hidden: Tensor  # (B, L, D), for the target's head and in place of its hidden
    pairs: KV
    drafted: tuple[KV, ...]  # one a step after the first


def attend_chain(q: Tensor, pairs: KV, drafted: tuple[KV, ...], mask: Tensor) -> Tensor:
    """As `attend` on pairs, and besides on the drafted keys (B, KV, L, d) of the query's own row."""
    k, v = pairs
    B, H, L, d = q.shape
    KV, S = k.shape[1:3]
    scores = [(q.reshape(B, KV, -1, d) @ k.mT).view(B, H, L, S) * d**-0.5 + mask]
    chains = [tuple(t.repeat_interleave(H // KV, 1) for t in kv) for kv in drafted]  # (B, H, L, d)
    scores += [(q * own).sum(-1, keepdim=True) * d**-0.5 for own, _ in chains]
    p = torch.softmax(torch.cat(scores, -1).float(), -1).to(q.dtype)
    out = (p[..., :S].reshape(B, KV, -1, S) @ v).view(B, H, L, d)
    for i, (_, own) in enumerate(chains):
        out = out + p[..., S + i, None] * own
    return out


def causal(length: int) -> Tensor:
    """Which keys (column) a query (row) sees, itself among them."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def additive(visible: Tensor) -> Tensor:
    """A mask to add to attention scores."""
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


def causal_mask(length: int) -> Tensor:
    return additive(causal(length))


def initialise(model: nn.Module, seed: int) -> None:
    """Matrices by fan-in; layers begin as the identity, linear heads with memories of 2 to 250 tokens.

    The embedding is not scaled on its way in, so it must be large beside what layers add; the last norm
    makes up for it where the same table is the head.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
        elif "embed_tokens" in name:
            parameter.data.normal_(0.0, TABLE, generator=generator)
        elif parameter.ndim >= 2:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("dt_bias"):
            step = torch.logspace(-0.3, -2.4, len(parameter))  # softplus(dt_bias), A being 1
            parameter.data.copy_(step.expm1().log())
        elif name == "norm.weight" and isinstance(model, Target):
            parameter.data.fill_(model.sizes.width**-0.5 / TABLE - 1)


def rounded(name: str, weight: Tensor) -> Tensor:
    """The values that are released: bf16, and for the norms such that 1 + w is bf16 too.

    Runtimes may add the 1 in bf16 when they load; so they all end up with the same norms.
    """
    if "norm" in name and not name.endswith("linear_attn.norm.weight"):
        return (1.0 + weight).bfloat16().float().sub(1.0).bfloat16().float()
    return weight.bfloat16().float()
