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
from mtp_mlx.models.qwen3_5_mtp import Head, State
from mtp_mlx.types import Draft, Mask, Output, Pair, Span


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

    def start(self, cache: Cache) -> State:
        pairs = LatePairs()
        cache.attach(pairs)
        return State(cache, pairs, None)

    def advance(self, state: State, tokens: mx.array, span: Span, output: Output, count: mx.array) -> State:
        if state.hidden is None:
            state.pairs.first = span.start
        return self.head.advance(state, tokens, span, output, count)

    def draft(self, state: State, last: mx.array, k: int) -> Draft:
        return self.head.draft(state, last, k)


def main() -> None:
    parser = acceptance.parser()
    parser.set_defaults(model="demo-qwen", depth=[3])
    options = parser.parse_args()
    pair, tokenizer = mtp_mlx.load(options.model, options.drafter, dtype=acceptance.DTYPES[options.dtype])
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
