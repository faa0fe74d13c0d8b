"""Train the demo target on the packed corpus, for a fixed number of steps."""

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench.demo.gemma import TARGET, Ropes, Target, initialise, parameter_count, ropes_at, training_masks
from bench.demo.optimizer import Optimizer
from bench.demo.training import LENGTH, Run, Stream, train_from_command_line

ROWS = 8  # sequences per step
# Positions start here or there, so that a small model meets every position up to its limit.
OFFSETS = (0, 0, 512, 1024, 1536)


class Loss(torch.nn.Module):
    """Mean nats per token of a batch of rows."""

    def __init__(self, model: Target) -> None:
        super().__init__()
        self.model = model
        self.masks = training_masks(LENGTH, model.sizes.window)

    def forward(self, rows: Tensor, ropes: Ropes) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _ = self.model(rows[:, :-1], ropes, self.masks)
            return F.cross_entropy(self.model.head(hidden).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(loss: torch.nn.Module, stream: Stream, batches: int) -> float:
    """Mean over the first rows of the held-out stream, at positions from 0."""
    ropes = ropes_at(torch.arange(LENGTH), TARGET)
    losses = [loss(stream.rows(i * ROWS, ROWS), ropes).item() for i in range(batches)]
    return sum(losses) / len(losses)


def train(out: Path, steps: int) -> None:
    model = Target()
    initialise(model, seed=0)
    optimizer = Optimizer(model, steps=steps)
    run = Run(out / "target", model, optimizer)
    loss = torch.compile(Loss(model))
    train_rows, heldout = Stream(out / "train.npy"), Stream(out / "heldout.npy")
    tables = [ropes_at(torch.arange(o, o + LENGTH), TARGET) for o in OFFSETS]
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
    run.log(heldout=round(heldout_loss(loss, heldout, len(heldout.starts) // ROWS), 4))
    run.save()


if __name__ == "__main__":
    train_from_command_line(train, __doc__)
