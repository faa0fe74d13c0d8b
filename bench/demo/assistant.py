"""Gemma's assistant: how it learns, and how many of its drafts are right."""

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench.demo.drafter import sharpened, soft_cross_entropy, train_drafter
from bench.demo.gemma import (
    ASSISTANT,
    KV,
    TARGET,
    Assistant,
    Target,
    draft_masks,
    draft_training_masks,
    initialise,
    ropes_at,
    target_masks,
    training_masks,
)
from bench.demo.training import arguments, autocast, load_model

UNROLLED = 5  # draft steps
OWN, CORPUS = 384, 512  # tokens of a row of continuations, and of corpus text: longer contexts


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
        with autocast():
            hidden, kv = self.target(ids, self.ropes, self.masks)
            return hidden, sharpened(self.target.head(hidden)), kv


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
        with autocast():
            for s in range(UNROLLED):
                token = F.pad(embedded[:, s:], (0, 0, 0, s))
                logits, h = self.assistant(token, h, self.ropes, kv, self.masks, rows=slice(1, L - s))
                losses.append(soft_cross_entropy(logits, p[:, 1 + s :]))
        return torch.stack(losses)


@torch.no_grad()
def right_drafts(target: Target, assistant: Assistant, ids: Tensor, first: int, drafts: int) -> Tensor:
    """How many of `drafts` drafts from P = first.. are right, (L - first - drafts,); ids (1, L)."""
    L = ids.shape[1]
    last = L - drafts  # exclusive; later positions lack tokens to compare with
    hidden, kv = target(ids, ropes_at(torch.arange(L), TARGET), target_masks(L, TARGET.window))
    masks = {kind: mask[: last - first] for kind, mask in draft_masks(first, L, ASSISTANT.window).items()}
    ropes = ropes_at(torch.arange(first, last), ASSISTANT)
    token, h = ids[:, first:last], hidden[:, first - 1 : last - 1]
    alive, count = torch.ones(last - first, dtype=torch.bool), torch.zeros(last - first, dtype=torch.int64)
    for s in range(1, drafts + 1):
        logits, h = assistant(target.embed(token), h, ropes, kv, masks)
        token = logits.argmax(-1)
        alive &= token[0] == ids[0, first + s : last + s]
        count += alive
    return count


def train(out: Path, steps: int) -> None:
    target, assistant = load_model(Target(), out / "target"), Assistant()
    initialise(assistant, seed=1)
    lengths = (OWN, CORPUS)
    train_drafter(
        assistant,
        out / "assistant",
        steps,
        embed=target.embed,
        reading={length: torch.compile(Reading(target, length)) for length in lengths},
        losses={length: torch.compile(Loss(assistant, length)) for length in lengths},
        own=OWN,
        corpus=CORPUS,
        unrolled=UNROLLED,
    )


if __name__ == "__main__":
    args = arguments("Train the demo assistant.").parse_args()
    train(args.out, args.steps)
