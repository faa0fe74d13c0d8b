"""Measure the pair: tokens per round and acceptance on held-out prompts.

Greedy speculation writes exactly what the target writes alone. So its rounds can be replayed along the
target's greedy continuation: drafts are right up to the first that differs from it. The same holds for sampled
text, where a draft is kept if it is what the target's own sampler drew.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bench.demo import assistant, mtp
from bench.demo.continuations import extend
from bench.demo.families import FAMILIES, Family, family_argument
from bench.demo.gemma import Assistant
from bench.demo.qwen import Head
from bench.demo.training import load_model
from bench.demo.vocabulary import EOS

LONGEST = 6  # drafts per round
WRITTEN = 200  # tokens per prompt
SAMPLED = 0.7  # the other temperature measured


def rounds(right: list[int], k: int, end: int) -> list[int]:
    """Drafts accepted in each round with k drafts, from the first position until `end`."""
    accepted, at = [], 0
    while at < end:
        accepted.append(min(k, right[at]))
        at += accepted[-1] + 1
    return accepted


RightDrafts = Callable[[Tensor, int], Tensor]  # of ids (1, L) and the first position: how many from each on


def drafters(name: str, family: Family, out: Path) -> tuple[nn.Module, dict[str, RightDrafts]]:
    """A family's target, and its drafter in every way that is measured; the first is the way it is meant."""
    target = family.load_target(out)
    if name == "gemma":
        drafter = load_model(Assistant(), out / "assistant")
        return target, {"": lambda ids, first: assistant.right_drafts(target, drafter, ids, first, LONGEST)}
    drafter = load_model(Head(), out / "head", family.rounded)
    return target, {
        "": lambda ids, first: mtp.right_drafts(target, drafter, ids, first, LONGEST),
        ", head not primed": lambda ids, first: mtp.right_drafts(target, drafter, ids, first, LONGEST, primed=False),
    }


@dataclass(frozen=True)
class Replay:
    """One prompt: right drafts from every position of its continuation, and where the continuation ends."""

    kind: str
    right: dict[str, list[int]]  # by way of drafting
    end: int


def replay(
    family: Family,
    target: nn.Module,
    ways: dict[str, RightDrafts],
    prompt: list[int],
    *,
    kind: str,
    temperature: float,
) -> Replay:
    """Continue the prompt and draft from every position."""
    length = len(prompt) + WRITTEN + LONGEST + 1
    ids = extend(family, target, torch.tensor([prompt]), length, torch.tensor([[temperature]]), seed=len(prompt))
    written = ids[0, len(prompt) : len(prompt) + WRITTEN].tolist()
    end = written.index(EOS) if EOS in written else WRITTEN - 1  # the prompt's own pass gave the first
    return Replay(kind, {way: right(ids, len(prompt)).tolist() for way, right in ways.items()}, end)


def summary(replays: list[Replay], way: str) -> dict[str, Any]:
    """Tokens per round by k, and the chance of draft s to be right if those before were."""
    tokens = {}
    for k in range(1, LONGEST + 1):
        accepted = [n for r in replays for n in rounds(r.right[way], k, r.end)]
        tokens[str(k)] = round(sum(n + 1 for n in accepted) / len(accepted), 3)
    reached = [sum(n >= s for n in accepted) for s in range(LONGEST + 1)]
    chances = [round(after / max(1, before), 3) for before, after in pairwise(reached)]
    return {"prompts": len(replays), "tokens_per_round": tokens, "acceptance": chances}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    family_argument(parser)
    args = parser.parse_args()
    family = FAMILIES[args.family]
    target, ways = drafters(args.family, family, args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer" / "tokenizer.json"))
    prompts = json.loads((Path(__file__).parent / "heldout.json").read_text())
    replays = {
        temperature: [
            replay(family, target, ways, tokenizer.encode(p["text"]).ids, kind=p["kind"], temperature=temperature)
            for p in prompts
        ]
        for temperature in (0.0, SAMPLED)
    }
    result = {}
    for way in ways:
        result |= {
            f"code{way}": summary([r for r in replays[0.0] if r.kind == "code"], way),
            f"text{way}": summary([r for r in replays[0.0] if r.kind == "text"], way),
            f"all{way}": summary(replays[0.0], way),
            f"all, at temperature {SAMPLED}{way}": summary(replays[SAMPLED], way),
        }
    print(json.dumps(result, indent=1))
    (args.out / "acceptance.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
