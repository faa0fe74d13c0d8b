"""What every trained model shares: the stream of batches, the log, and checkpoints to resume from."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.demo.optimizer import FAST, Optimizer

LENGTH = 512


def autocast() -> torch.autocast:
    """Matrix products in bf16 where the CPU has them, as for the first pair; fp32 elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 == FAST)


class Stream:
    """Rows of LENGTH + 1 ids cut from a packed stream, in a shuffled order fixed by the seed."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        ids = torch.from_numpy(np.load(path).astype(np.int64))
        starts = torch.arange(0, len(ids) - LENGTH - 1, LENGTH)
        generator = torch.Generator().manual_seed(seed)
        self.ids, self.starts = ids, starts[torch.randperm(len(starts), generator=generator)]

    def rows(self, first: int, count: int) -> Tensor:
        """Rows first..first+count-1 of the order (count, LENGTH + 1), wrapping into a next epoch."""
        picked = [int(self.starts[i % len(self.starts)]) for i in range(first, first + count)]
        return torch.stack([self.ids[s : s + LENGTH + 1] for s in picked])


class Run:
    """A folder with log.jsonl and a checkpoint that training resumes from."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.seconds, self.since = 0.0, time.monotonic()
        if (folder / "checkpoint.pt").exists():
            self.resume()

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.since

    def log(self, **row: float) -> None:
        row = {"step": self.optimizer.done, "seconds": round(self.elapsed(), 1), **row}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        """Write the checkpoint and replace the old one at once."""
        state = {
            "model": self.model.state_dict(),
            "adam": self.optimizer.adam.state_dict(),
            "muon": self.optimizer.muon.state,
            "done": self.optimizer.done,
            "seconds": self.elapsed(),
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").rename(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt")
        self.model.load_state_dict(state["model"])
        self.optimizer.adam.load_state_dict(state["adam"])
        self.optimizer.muon.state = state["muon"]
        self.optimizer.done, self.seconds = state["done"], state["seconds"]


Rounding = Callable[[str, Tensor], Tensor]  # of a weight's name and values


def to_bf16(name: str, weight: Tensor) -> Tensor:
    """The values that a bf16 file keeps."""
    return weight.bfloat16().float()


def load_model(model: nn.Module, folder: Path, rounded: Rounding = to_bf16) -> nn.Module:
    """Load a checkpoint's weights rounded as they are released, into fp32."""
    weights = torch.load(folder / "checkpoint.pt")["model"]
    model.load_state_dict({name: rounded(name, w) for name, w in weights.items()})
    return model.eval().requires_grad_(False)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every trainer's command line has: the folder and the number of steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    return parser
