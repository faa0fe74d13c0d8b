"""Muon for matrices, AdamW for tables and scales: the optimizer of every demo model."""

import torch
from torch import Tensor, nn

# The type that this CPU multiplies fastest.
FAST = torch.bfloat16 if torch.cpu.get_capabilities()["avx512_bf16"] else torch.float32
TABLES = ("embed_tokens",)  # looked up or used as a head: rows, not a map


def orthogonalise(g: Tensor) -> Tensor:
    """Push the singular values of matrices (N, a, b), a <= b, to about 1 by five Newton-Schulz steps."""
    x = g.to(FAST)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.float()


class Muon:
    """Momentum, orthogonalised (Jordan et al. 2024), over all matrices of one shape at once."""

    def __init__(self, matrices: list[nn.Parameter], *, rate: float, momentum: float = 0.95) -> None:
        self.rate, self.momentum = rate, momentum
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            self.groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.state = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for shape, group in self.groups.items():
            g = torch.stack([p.grad for p in group if p.grad is not None])
            m = self.state[shape].lerp_(g, 1 - self.momentum)
            update = g.lerp(m, self.momentum)
            tall = shape[0] > shape[1]
            update = orthogonalise(update.mT if tall else update)
            update = update.mT if tall else update
            size = max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(group, update, strict=True):
                p.mul_(1 - 0.1 * scale * self.rate).sub_(u, alpha=self.rate * scale * size)


class Optimizer:
    """Both, under one warmup and linear decay."""

    def __init__(
        self, model: nn.Module, *, steps: int, muon: float = 0.02, tables: float = 4e-3, scales: float = 1e-3
    ) -> None:
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and not any(t in n for t in TABLES)]
        looked_up = [p for n, p in named if p.ndim == 2 and any(t in n for t in TABLES)]
        others = [p for n, p in named if p.ndim != 2]  # and the kernels of convolutions
        self.muon = Muon(matrices, rate=muon)
        groups = [{"params": looked_up, "base": tables}, {"params": others, "base": scales}]
        self.adam = torch.optim.AdamW(groups, lr=tables, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.steps, self.done = steps, 0

    def factor(self) -> float:
        """Share of the full learning rate: 50 steps up, then linearly down to 2 %."""
        return min((self.done + 1) / 50, max(0.02, 1 - self.done / self.steps))

    def step(self) -> None:
        factor = self.factor()
        self.muon.step(factor)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for group_ in self.muon.groups.values():
            for p in group_:
                p.grad = None
        self.done += 1
