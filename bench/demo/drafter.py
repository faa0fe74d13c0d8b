"""Train a demo drafter: several draft steps from every position, towards the target's distribution.

A family brings how its target reads rows of ids and the losses of its drafter's steps on them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.demo.optimizer import Optimizer
from bench.demo.training import Run, Stream, parameter_count

TOKENS = 3072  # per step
# Drafts are argmax, so the drafter learns a sharper distribution, one nearer to the target's choice.
TEMPERATURE = 0.7

Reading = Callable[[Tensor], tuple[Tensor, ...]]  # of ids (B, L): what the losses of these rows take
Losses = Callable[..., Tensor]  # of embeddings (B, L, D) and what was read: (draft steps,)


def sharpened(logits: Tensor) -> Tensor:
    """Probabilities to learn from, in bf16."""
    return torch.softmax(logits / TEMPERATURE, -1).bfloat16()


def soft_cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """Mean over all positions."""
    return (torch.logsumexp(logits, -1) - (p * logits).sum(-1)).mean()


def is_corpus(step: int) -> bool:
    """Every fifth step reads corpus text: less certain distributions than the target's own continuations."""
    return step % 5 == 4


def tokens_read(steps: int, own: int, corpus: int) -> int:
    """In `steps` steps of rows of these lengths: only whole rows."""
    return sum(TOKENS // length * length for length in (corpus if is_corpus(i) else own for i in range(steps)))


def train_drafter(
    drafter: nn.Module,
    folder: Path,
    steps: int,
    *,
    embed: Callable[[Tensor], Tensor],
    reading: dict[int, Reading],
    losses: dict[int, Losses],
    own: int,
    corpus: int,
    unrolled: int,
) -> None:
    """Train on rows of `own` tokens of the target's continuations and of `corpus` tokens of the corpus."""
    out = folder.parent
    optimizer = Optimizer(drafter, steps=steps)
    run = Run(folder, drafter, optimizer)
    written = torch.from_numpy(np.load(out / "continuations.npy").astype(np.int64))
    written = written[torch.randperm(len(written), generator=torch.Generator().manual_seed(0))]
    stream = Stream(out / "train.npy", seed=1)
    weights = torch.tensor([0.9**s for s in range(unrolled)])
    print(f"{parameter_count(drafter)} parameters, {steps} steps, {len(written)} continuations", flush=True)
    mean = torch.zeros(unrolled)
    while optimizer.done < steps:
        step = optimizer.done
        length = corpus if is_corpus(step) else own
        rows = TOKENS // length
        if is_corpus(step):
            ids = stream.rows(step // 5 * rows, rows)[:, :length]
        else:
            first = (step - step // 5) * rows
            ids = written[[i % len(written) for i in range(first, first + rows)]][:, :length]
        values = losses[length](embed(ids), *reading[length](ids))
        (values @ weights).backward()
        optimizer.step()
        if not is_corpus(step):
            mean += values.detach() / 40
        if optimizer.done % 50 == 0:
            run.log(**{f"loss{s + 1}": round(x, 4) for s, x in enumerate(mean.tolist())})
            mean.zero_()
        if optimizer.done % 200 == 0:
            run.save()
    run.save()
