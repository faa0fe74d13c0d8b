"""Train the demo assistant: several draft steps from every position, towards the target's distribution."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench.demo.gemma import (
    ASSISTANT,
    KV,
    TARGET,
    Assistant,
    Target,
    draft_training_masks,
    initialise,
    parameter_count,
    ropes_at,
    training_masks,
)
from bench.demo.optimizer import Optimizer
from bench.demo.training import Run, Stream, load_model, train_from_command_line

UNROLLED = 5  # draft steps
OWN, CORPUS = 384, 512  # tokens of a row of continuations, and of corpus text
TOKENS = 3072  # per step, of either
# Drafts are argmax, so the assistant learns a sharper distribution, one nearer to the target's choice.
TEMPERATURE = 0.7


class Reading(torch.nn.Module):
    """What the target knows about rows of ids (B, L): nothing here is trained."""

    def __init__(self, target: Target, length: int) -> None:
        super().__init__()
        self.target = target
        self.masks = training_masks(length, TARGET.window)
        self.ropes = ropes_at(torch.arange(length), TARGET)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, KV]:
        """Hidden (B, L, D), sharpened probabilities of the next token (B, L, V) in bf16, and the K/V."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden, kv = self.target(ids, self.ropes, self.masks)
            return hidden, torch.softmax(self.target.head(hidden) / TEMPERATURE, -1).bfloat16(), kv


class Loss(torch.nn.Module):
    """Cross-entropies of the unrolled draft steps at all positions of rows of `length`."""

    def __init__(self, assistant: Assistant, length: int) -> None:
        super().__init__()
        self.assistant, self.length = assistant, length
        self.masks = draft_training_masks(length, ASSISTANT.window)
        self.ropes = ropes_at(torch.arange(length), ASSISTANT)

    def forward(self, embedded: Tensor, hidden: Tensor, p: Tensor, kv: KV) -> Tensor:
        """(UNROLLED,) mean losses; embedded (B, L, D) are the target's scaled embeddings of the ids.

        Step s from position P reads token P+s-1 and predicts token P+s, whose distribution stands at P+s-1.
        """
        L = self.length
        h = F.pad(hidden[:, :-1], (0, 0, 1, 0))  # position P starts from the hidden of P-1
        losses = []
        with torch.autocast("cpu", torch.bfloat16):
            for s in range(UNROLLED):
                token = F.pad(embedded[:, s:], (0, 0, 0, s))
                logits, h = self.assistant(token, h, self.ropes, kv, self.masks, rows=slice(1, L - s))
                wanted = p[:, 1 + s :]
                losses.append((torch.logsumexp(logits, -1) - (wanted * logits).sum(-1)).mean())
        return torch.stack(losses)


def train(out: Path, steps: int) -> None:
    target, assistant = Target(), Assistant()
    load_model(target, out / "target")
    initialise(assistant, seed=1)
    optimizer = Optimizer(assistant, steps=steps)
    run = Run(out / "assistant", assistant, optimizer)
    own = torch.from_numpy(np.load(out / "continuations.npy").astype(np.int64))
    own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))]
    corpus = Stream(out / "train.npy", seed=1)
    reading = {length: torch.compile(Reading(target, length)) for length in (OWN, CORPUS)}
    loss = {length: torch.compile(Loss(assistant, length)) for length in (OWN, CORPUS)}
    weights = torch.tensor([0.9**s for s in range(UNROLLED)])
    print(f"{parameter_count(assistant)} parameters, {steps} steps, {len(own)} continuations", flush=True)
    mean = torch.zeros(UNROLLED)
    while optimizer.done < steps:
        step = optimizer.done
        # Every fifth step reads corpus text: longer contexts, and less certain distributions.
        length = CORPUS if step % 5 == 4 else OWN
        rows = TOKENS // length
        if length == CORPUS:
            ids = corpus.rows(step // 5 * rows, rows)[:, :length]
        else:
            first = (step - step // 5) * rows
            ids = own[[i % len(own) for i in range(first, first + rows)]][:, :length]
        hidden, p, kv = reading[length](ids)
        losses = loss[length](target.embed(ids), hidden, p, kv)
        (losses @ weights).backward()
        optimizer.step()
        if length == OWN:
            mean += losses.detach() / 40
        if optimizer.done % 50 == 0:
            run.log(**{f"loss{s + 1}": round(x, 4) for s, x in enumerate(mean.tolist())})
            mean.zero_()
        if optimizer.done % 200 == 0:
            run.save()
    run.save()


if __name__ == "__main__":
    train_from_command_line(train, __doc__)
