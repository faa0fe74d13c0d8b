"""Train a demo target on the packed corpus, for a fixed number of steps."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench.demo.families import FAMILIES, Family, family_argument
from bench.demo.optimizer import Optimizer
from bench.demo.training import LENGTH, Run, Stream, arguments, autocast, parameter_count

ROWS = 8  # sequences per step
# Positions start here or there, so that a small model meets every position up to its limit.
OFFSETS = (0, 0, 512, 1024, 1536)


class Loss(torch.nn.Module):
    """Mean nats per token of a batch of rows."""

    def __init__(self, model: torch.nn.Module, family: Family) -> None:
        super().__init__()
        self.model, self.family = model, family
        self.masks = family.masks(LENGTH)

    def forward(self, rows: Tensor, ropes: Any) -> Tensor:
        with autocast():
            hidden = self.family.hidden(self.model, rows[:, :-1], ropes, self.masks)
            return F.cross_entropy(self.model.head(hidden).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(loss: torch.nn.Module, ropes: Any, stream: Stream) -> float:
    """Mean over the held-out stream."""
    batches = len(stream.starts) // ROWS
    return sum(loss(stream.rows(i * ROWS, ROWS), ropes).item() for i in range(batches)) / batches


def train(out: Path, steps: int, family: Family) -> None:
    model = family.target()
    family.initialise(model, 0)
    optimizer = Optimizer(model, steps=steps, tables=family.tables)
    run = Run(out / "target", model, optimizer)
    loss = torch.compile(Loss(model, family))
    train_rows, heldout = Stream(out / "train.npy"), Stream(out / "heldout.npy")
    tables = [family.ropes(torch.arange(o, o + LENGTH)) for o in OFFSETS]
    print(f"{parameter_count(model)} parameters, {steps} steps of {ROWS * LENGTH} tokens", flush=True)
    mean = 0.0
    while optimizer.done < steps:
        step = optimizer.done
        value = loss(train_rows.rows(step * ROWS, ROWS), tables[step % len(tables)])
        value.backward()
        optimizer.step()
        mean += value.item() / 25
        if optimizer.done % 25 == 0:
            run.log(loss=round(mean, 4))
            mean = 0.0
        if optimizer.done % 150 == 0:
            run.save()
    run.log(heldout=round(heldout_loss(loss, tables[0], heldout), 4))
    run.save()


if __name__ == "__main__":
    parser = arguments(__doc__)
    family_argument(parser)
    args = parser.parse_args()
    train(args.out, args.steps, FAMILIES[args.family])
