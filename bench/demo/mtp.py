"""Qwen's multi-token prediction head: how it learns, and how many of its drafts are right."""

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench.demo.drafter import sharpened, soft_cross_entropy, train_drafter
from bench.demo.families import QWEN
from bench.demo.qwen import Head, Target, additive, causal, causal_mask, initialise, rope_table
from bench.demo.training import arguments, autocast

UNROLLED = 4  # draft steps
LENGTH = 384  # tokens of a row


class Reading(torch.nn.Module):
    """What the target knows about rows of ids (B, L): nothing here is trained."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target, self.mask, self.rope = target, causal_mask(LENGTH), rope_table(torch.arange(LENGTH))

    @torch.no_grad()
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden (B, L, D) and sharpened probabilities of the next token (B, L, V) in bf16."""
        with autocast():
            hidden = self.target(ids, self.rope, self.mask)
            return hidden, sharpened(self.target.head(hidden))


class Loss(torch.nn.Module):
    """Cross-entropies of the unrolled draft steps from all slots of rows."""

    def __init__(self, target: Target, head: Head) -> None:
        super().__init__()
        self.target, self.head, self.mask = target, head, causal_mask(LENGTH)
        self.ropes = [rope_table(torch.arange(s, s + LENGTH)) for s in range(UNROLLED)]

    def forward(self, embedded: Tensor, hidden: Tensor, p: Tensor) -> Tensor:
        """(UNROLLED,) mean losses; embedded (B, L, D) are the ids'.

        Step s (from 1) of the chain from slot t stands in slot t+s-1: it reads token t+s and predicts token
        t+s+1, whose distribution stands at t+s. It sees the true pairs 0..t and the chain's own since.
        """
        h, pairs, drafted = hidden, None, ()
        losses = []
        with autocast():
            for s, rope in enumerate(self.ropes, start=1):
                token = F.pad(embedded[:, s:], (0, 0, 0, s))
                h, pairs, drafted = self.head(token, h, rope, self.mask, pairs, drafted)
                losses.append(soft_cross_entropy(self.target.head(h[:, :-s]), p[:, s:]))
        return torch.stack(losses)


@torch.no_grad()
def right_drafts(target: Target, head: Head, ids: Tensor, first: int, drafts: int, *, primed: bool = True) -> Tensor:
    """How many of `drafts` drafts are right after tokens P = first.., (L - first - drafts,); ids (1, L).

    Token P is known, but the target has not read it; the newest true pair is that of P and the hidden of P-1.
    A head that is not primed knows no pairs but those of the tokens from `first` on.
    """
    L = ids.shape[1]
    last = L - drafts  # exclusive; later positions lack tokens to compare with
    hidden = target(ids, rope_table(torch.arange(L)), causal_mask(L))
    seen = causal(L - 1)
    if not primed:
        seen[first - 1 :, : first - 1] = False
    rope = rope_table(torch.arange(L - 1))
    h, pairs, drafted = head(target.embed(ids[:, 1:]), hidden[:, :-1], rope, additive(seen), None, ())
    h, mask = h[:, first - 1 : last - 1], additive(seen[first - 1 : last - 1])
    alive, count = torch.ones(last - first, dtype=torch.bool), torch.zeros(last - first, dtype=torch.int64)
    for s in range(1, drafts + 1):
        token = target.head(h).argmax(-1)
        alive &= token[0] == ids[0, first + s : last + s]
        count += alive
        rope = rope_table(torch.arange(first - 1 + s, last - 1 + s))
        h, pairs, drafted = head(target.embed(token), h, rope, mask, pairs, drafted)
    return count


def train(out: Path, steps: int) -> None:
    target, head = QWEN.load_target(out), Head()
    initialise(head, seed=1)
    head.norm.load_state_dict(target.norm.state_dict())  # both feed the same table
    train_drafter(
        head,
        out / "head",
        steps,
        embed=target.embed,
        reading={LENGTH: torch.compile(Reading(target))},
        losses={LENGTH: torch.compile(Loss(target, head))},
        own=LENGTH,
        corpus=LENGTH,
        unrolled=UNROLLED,
    )


if __name__ == "__main__":
    args = arguments("Train the demo's multi-token prediction head.").parse_args()
    train(args.out, args.steps)
