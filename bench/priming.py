"""What it is worth that an mtp head has read the whole prompt.

    python bench/priming.py [--model demo-qwen] [--depth 3] [--tokens 200] [--temp 0.7] [--out figures.json]

Tokens per round of the same texts by the head as it is and by one that is told of nothing before the first token
generated, as in programs that leave the prompt out. Arms alternate from text to text. The texts do not depend on it.
"""

import json
import sys
from dataclasses import dataclass

import acceptance
import mlx.core as mx
import report

import mtp_mlx
from mtp_mlx.cache import Cache, FullCache
from mtp_mlx.models.qwen3_5_mtp import Head
from mtp_mlx.types import Mask, Pair, Pick, Span, State


class LatePairs(FullCache):
    """Pairs from one slot on; those before were never written and must not be seen."""

    first = mx.array(0)

    def mask(self, span: Span) -> Mask:
        return super().mask(span) & (mx.arange(self._buffers.capacity) >= self.first)


@dataclass(frozen=True)
class Unprimed:
    """A head that is not told of the prompt."""

    head: Head
    reads_prompt: bool = False

    @property
    def limit(self) -> int:
        return self.head.limit

    @property
    def nbytes(self) -> int:
        return self.head.nbytes

    def kv_bytes(self, tokens: int) -> int:
        return self.head.kv_bytes(tokens)

    def reads(self, cache: Cache) -> int:
        return self.head.reads(cache)

    def start(self, cache: Cache) -> State:
        cache.attach(LatePairs())
        return ()

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        """The state is the head's, and the slot of its first pair."""
        first = state[1] if state else mx.array(span.start)
        return (*self.head.advance(state[:1], cache, tokens, span, hidden, count), first)

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        pairs = cache.layers[-1]
        assert isinstance(pairs, LatePairs)
        pairs.first = state[1]
        self.head.draft(state[:1], cache, last, k, pick)


def main() -> None:
    parser = acceptance.parser()
    parser.set_defaults(model="demo-qwen", depth=[3])
    options = parser.parse_args()
    loaded, tokenizer = mtp_mlx.load(options.model, drafter=options.drafter, dtype=acceptance.DTYPES[options.dtype])
    pair = loaded.pair
    if not isinstance(pair.drafter, Head):
        sys.exit(f"{options.model} has no mtp head")
    arms = {"primed": pair, "unprimed": Pair(pair.target, Unprimed(pair.drafter))}
    prompts = json.loads(options.prompts.read_text())[: options.limit]
    figures: dict[int, dict[str, object]] = {}
    for depth in options.depth:
        runs: dict[str, list[mtp_mlx.Stats]] = {name: [] for name in arms}
        for number in range(len(prompts)):
            for name, arm in arms.items():
                runs[name].append(acceptance.run(arm, tokenizer, prompts, number, depth, options))
        figures[depth] = {name: acceptance.summary(stats) for name, stats in runs.items()}
        print(f"depth {depth}: {figures[depth]}", file=sys.stderr)
    report.write({"settings": acceptance.settings(options, prompts), "depths": figures}, options.out)


if __name__ == "__main__":
    main()
