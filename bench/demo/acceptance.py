"""Measure the pair: tokens per round and acceptance on held-out prompts.

Greedy speculation writes exactly what the target writes alone. So its rounds can be replayed along the
target's greedy continuation: drafts are right up to the first that differs from it. The same holds for sampled
text, where a draft is kept if it is what the target's own sampler drew.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.demo.continuations import extend
from bench.demo.gemma import ASSISTANT, TARGET, Assistant, Target, draft_masks, ropes_at, target_masks
from bench.demo.training import load_model
from bench.demo.vocabulary import EOS

LONGEST = 6  # drafts per round
WRITTEN = 200  # tokens per prompt
SAMPLED = 0.7  # the other temperature measured


@torch.no_grad()
def right_drafts(target: Target, assistant: Assistant, ids: Tensor, first: int) -> Tensor:
    """How many of LONGEST drafts from P = first.. are right, (L - first - LONGEST,); ids (1, L)."""
    L = ids.shape[1]
    last = L - LONGEST  # exclusive; later positions lack tokens to compare with
    hidden, kv = target(ids, ropes_at(torch.arange(L), TARGET), target_masks(L, TARGET.window))
    masks = {kind: mask[: last - first] for kind, mask in draft_masks(first, L, ASSISTANT.window).items()}
    ropes = ropes_at(torch.arange(first, last), ASSISTANT)
    token, h = ids[:, first:last], hidden[:, first - 1 : last - 1]
    alive, count = torch.ones(last - first, dtype=torch.bool), torch.zeros(last - first, dtype=torch.int64)
    for s in range(1, LONGEST + 1):
        logits, h = assistant(target.embed(token), h, ropes, kv, masks)
        token = logits.argmax(-1)
        alive &= token[0] == ids[0, first + s : last + s]
        count += alive
    return count


def rounds(right: list[int], k: int, end: int) -> list[int]:
    """Drafts accepted in each round with k drafts, from the first position until `end`."""
    accepted, at = [], 0
    while at < end:
        accepted.append(min(k, right[at]))
        at += accepted[-1] + 1
    return accepted


@dataclass(frozen=True)
class Replay:
    """One prompt: right drafts from every position of its continuation, and where the continuation ends."""

    kind: str
    right: list[int]
    end: int


def replay(target: Target, assistant: Assistant, prompt: list[int], *, kind: str, temperature: float) -> Replay:
    """Continue the prompt and draft from every position."""
    length = len(prompt) + WRITTEN + LONGEST + 1
    ids = extend(target, torch.tensor([prompt]), length, torch.tensor([[temperature]]), seed=len(prompt))
    written = ids[0, len(prompt) : len(prompt) + WRITTEN].tolist()
    end = written.index(EOS) if EOS in written else WRITTEN - 1  # the prompt's own pass gave the first
    return Replay(kind, right_drafts(target, assistant, ids, len(prompt)).tolist(), end)


def summary(replays: list[Replay]) -> dict[str, Any]:
    """Tokens per round by k, and the chance of draft s to be right if those before were."""
    tokens = {}
    for k in range(1, LONGEST + 1):
        accepted = [n for r in replays for n in rounds(r.right, k, r.end)]
        tokens[str(k)] = round(sum(n + 1 for n in accepted) / len(accepted), 3)
    reached = [sum(n >= s for n in accepted) for s in range(LONGEST + 1)]
    chances = [round(after / max(1, before), 3) for before, after in pairwise(reached)]
    return {"prompts": len(replays), "tokens_per_round": tokens, "acceptance": chances}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    target, assistant = Target(), Assistant()
    load_model(target, args.out / "target")
    load_model(assistant, args.out / "assistant")
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer" / "tokenizer.json"))
    prompts = json.loads((Path(__file__).parent / "heldout.json").read_text())
    replays = {
        temperature: [
            replay(target, assistant, tokenizer.encode(p["text"]).ids, kind=p["kind"], temperature=temperature)
            for p in prompts
        ]
        for temperature in (0.0, SAMPLED)
    }
    result = {
        "code": summary([r for r in replays[0.0] if r.kind == "code"]),
        "text": summary([r for r in replays[0.0] if r.kind == "text"]),
        "all": summary(replays[0.0]),
        f"all, at temperature {SAMPLED}": summary(replays[SAMPLED]),
    }
    print(json.dumps(result, indent=1))
    (args.out / "acceptance.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
