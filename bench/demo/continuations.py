"""The target's own continuations of training prompts: what a drafter learns from."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.demo.corpus import Document, load_corpus
from bench.demo.families import FAMILIES, Family, family_argument
from bench.demo.optimizer import FAST
from bench.demo.vocabulary import BOS

LENGTH = 385  # tokens of a row, prompt and continuation: 384 to read, one more to predict


class Decoding:
    """Batched decoding with a cache; all rows of a batch are equally long."""

    def __init__(self, family: Family, target: nn.Module, capacity: int) -> None:
        self.family, self.target, self.past = family, target, family.past(capacity)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Read ids (B, L) and return the logits that follow the last (B, V)."""
        first, block = self.past.length, ids.shape[1]
        ropes = self.family.ropes(torch.arange(first, first + block))
        hidden = self.family.hidden(self.target, ids, ropes, self.past.masks(block), self.past)
        return self.target.head(hidden[:, -1])


def pick(logits: Tensor, temperature: Tensor, generator: torch.Generator) -> Tensor:
    """Next tokens (B, 1): Gumbel-max sampling at each row's temperature (B, 1), greedy where it is 0."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits + temperature * noise).argmax(-1, keepdim=True)


def extend(family: Family, target: nn.Module, prompts: Tensor, length: int, temperature: Tensor, seed: int) -> Tensor:
    """Continue prompts (B, L) to `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    decoding, rows, block = Decoding(family, target, length), [prompts], prompts
    for _ in range(length - prompts.shape[1]):
        block = pick(decoding.feed(block), temperature, generator)
        rows.append(block)
    return torch.cat(rows, 1)


class Prompts:
    """Training prompts: <bos> and then text from the beginning of a random line."""

    def __init__(self, out: Path, documents: list[Document], seed: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
        self.texts = [d.text for d in documents if not d.heldout]
        sizes = np.array([len(t) for t in self.texts], float)
        self.share, self.random = sizes / sizes.sum(), np.random.default_rng(seed)

    def one(self, length: int) -> list[int]:
        while True:
            text = self.texts[self.random.choice(len(self.texts), p=self.share)]
            start = text.rfind("\n", 0, self.random.integers(len(text))) + 1
            ids = self.tokenizer.encode(text[start : start + 12 * length]).ids
            if len(ids) >= length:
                assert ids[0] == BOS
                return ids[:length]

    def batch(self, rows: int) -> Tensor:
        """(rows, L) of one random length L, shorter ones more often."""
        length = int(np.exp(self.random.uniform(np.log(16), np.log(300))))
        return torch.tensor([self.one(length) for _ in range(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--rows", type=int, default=192)
    family_argument(parser)
    args = parser.parse_args()
    family = FAMILIES[args.family]
    target = family.load_target(args.out).to(FAST)
    prompts = Prompts(args.out, load_corpus(args.out), seed=1)
    # Three rows in four are greedy; the others are sampled at temperatures from 0.6 to 1.
    temperature = torch.linspace(0.6, 1.0, args.rows)[:, None]
    temperature[torch.arange(args.rows) % 4 != 0] = 0.0
    written, began = [], time.monotonic()
    for i in range(args.batches):
        rows = extend(family, target, prompts.batch(args.rows), LENGTH, temperature, seed=i)
        written.append(rows.numpy().astype(np.uint16))
        np.save(args.out / "continuations.npy", np.concatenate(written))
        counts = {"rows": args.rows * (i + 1), "length": LENGTH, "seconds": round(time.monotonic() - began)}
        (args.out / "continuations.json").write_text(json.dumps(counts) + "\n")
        print(counts, flush=True)


if __name__ == "__main__":
    main()
