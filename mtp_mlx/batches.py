"""mlx-lm's `batch_generate` over a pair: many prompts at once, each with a sampler, seed and length of its own."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import BatchResponse
from mlx_lm.generate_utils import BatchStats
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.errors import RequestError
from mtp_mlx.generation import Progress, Response, generation, wired
from mtp_mlx.model import Model, pair_of
from mtp_mlx.ngram import NOBODY
from mtp_mlx.options import DEFAULT_PREFILL_STEP, Options, Prompt
from mtp_mlx.penalties import Penalties
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.prompt_cache import PromptCache, Text, stock_caches
from mtp_mlx.sampling import Sampler
from mtp_mlx.stats import Stats
from mtp_mlx.together import Together
from mtp_mlx.types import Pair

AnySampler = Sampler | Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]

AT_ONCE = 32  # texts that are written at the same time at most
MAX_TOKENS = 128  # mlx-lm's default for batches


@dataclass(kw_only=True)
class Figures(BatchStats):
    """mlx-lm's figures of a batch, and how drafting went."""

    drafted: int = 0
    accepted: int = 0


def batch_generate(
    model: Model | Pair,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    prompt_caches: list[list[Any]] | None = None,
    max_tokens: int | Sequence[int] = MAX_TOKENS,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    sampler: AnySampler | Sequence[AnySampler | None] | None = None,
    logits_processors: Sequence[Processor] | Sequence[Sequence[Processor]] | None = None,
    completion_batch_size: int = AT_ONCE,
    prefill_batch_size: int = 1,
    prefill_step_size: int = DEFAULT_PREFILL_STEP,
    max_kv_size: int | None = None,
    stream: Any = None,
    depth: int | str = "auto",
    penalties: Penalties | Sequence[Penalties | None] | None = None,
    seed: int | Sequence[int] | None = None,
) -> BatchResponse:
    """Write what follows each of many prompts, at most `completion_batch_size` of them at the same time.

    `model` is what `mtp_mlx.load` returns. Prompts are token ids or text. `prompt_caches` has for each of them a list
    of mlx-lm's caches, of what was read before, which stay as they are; with `return_prompt_caches` the response has
    such lists, which hold that, the prompt and all tokens that were given.

    `max_tokens`, `sampler`, `logits_processors`, `penalties` and `seed` are for all prompts, or lists with one for
    each; a single seed is that of the first prompt, the next one has the next seed. Each text is the one that
    `stream_generate` gives for its prompt alone: texts share a batch where that is measured to be faster, each keeps as
    many drafts as are right for it, and one that ends makes room for the next.

    `stream` is where MLX computes. Prompts are read one after the other, whatever `prefill_batch_size`; `max_kv_size`
    is refused, as nothing of a text can be forgotten without changing what comes.

    The response is mlx-lm's, its `stats` also say how many tokens were drafted and accepted. Raises RequestError for a
    list of another length than `prompts` and for what `stream_generate` refuses.
    """
    pair = pair_of(model)
    if pair.agreed.size > 1:
        raise RequestError("batches run on one machine, and this pair runs on several; use stream_generate")
    if min(completion_batch_size, prefill_batch_size) < 1:
        raise RequestError(f"batch sizes are {completion_batch_size} and {prefill_batch_size}; give at least 1")
    if max_kv_size is not None:
        raise RequestError(f"max_kv_size is {max_kv_size}; leave it out, and ask for fewer max_tokens if need be")
    count = len(prompts)
    seeds = list(range(seed, seed + count)) if isinstance(seed, int) else _each(seed, count, "seed")
    rows = zip(
        _each(max_tokens, count, "max_tokens"),
        _each(sampler, count, "sampler"),
        _each(penalties, count, "penalties"),
        _processors(logits_processors, count),
        seeds,
        strict=True,
    )
    options = [
        Options(tokens, depth, own, penalty, processors, number, prefill_step_size=prefill_step_size)
        for tokens, own, penalty, processors, number in rows
    ]
    caches = _caches(pair, prompt_caches, return_prompt_caches, count)
    running = replace(pair, drafter=NOBODY) if depth == 0 and not caches else pair
    prefixes = Prefixes(running, 0)  # it knows what memory texts have been promised
    texts = [
        partial(generation, running, tokenizer, prompt, own, caches[number] if caches else prefixes)
        for number, (prompt, own) in enumerate(zip(prompts, options, strict=True))
    ]
    results = _Results(count, verbose, return_logprobs)
    with wired(), mx.stream(stream) if stream is not None else nullcontext():
        for number, event in Together(running).write(texts, completion_batch_size):
            if isinstance(event, list) and caches:
                results.add(number, list(caches[number].hand_out(event)))
            else:
                results.add(number, event)
    returned = [cache.caches for cache in caches] if return_prompt_caches else None
    return results.response(tokenizer, return_token_ids, returned)


def _caches(pair: Pair, given: list[list[Any]] | None, wanted: bool, count: int) -> list[PromptCache]:
    """Copies of the caches that were given, or empty ones where they are wanted; none where nobody asks for any."""
    beside: list[Text] = []
    if given is None:
        return [PromptCache(pair, stock_caches(pair.target), beside) for _ in range(count * wanted)]
    return [PromptCache(pair, deepcopy(caches), beside) for caches in _each(given, count, "prompt_caches")]


def _each(given: Any, count: int, name: str) -> list[Any]:
    """One value for each of so many prompts."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise RequestError(f"{name} has {len(given)} entries for {count} prompts; give one for each, or one for all")
    return list(given)


def _processors(given: Sequence[Any] | None, count: int) -> list[list[Processor] | None]:
    of_texts = [isinstance(one, list | tuple) or one is None for one in given or ()]
    if given and all(of_texts):
        return _each(list(given), count, "logits_processors")
    if any(of_texts):
        raise RequestError("logits_processors are callables for all prompts, or a list of callables for each; not both")
    return [list(given) if given else None] * count


class _Results:
    """What comes of the texts."""

    def __init__(self, count: int, verbose: bool, logprobs: bool):
        self._began = time.perf_counter()
        self._verbose = verbose
        self._reading = 0.0
        self._last = self._began
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._logprobs: list[list[float]] | None = [[] for _ in range(count)] if logprobs else None
        self._ended: dict[int, Stats] = {}  # not the responses, whose log-probabilities are of a whole batch
        self._show()

    def add(self, number: int, event: Progress | list[Response]) -> None:
        now = time.perf_counter()
        if isinstance(event, Progress):
            self._reading += now - self._last
        else:
            self._add(number, event)
        self._last = now

    def _add(self, number: int, responses: list[Response]) -> None:
        for response in responses:
            if response.finish_reason != "stop":
                self._tokens[number].append(response.token)
                if self._logprobs is not None:
                    self._logprobs[number].append(cast(float, response.logprobs[response.token].item()))
        if responses[-1].finish_reason:
            self._ended[number] = responses[-1].stats
            self._show()

    def _show(self) -> None:
        if self._verbose:
            print(f"[batch_generate] Finished processing {len(self._ended)}/{len(self._tokens)} ...", end="\r")

    def response(self, tokenizer: TokenizerWrapper, token_ids: bool, caches: list[list[Any]] | None) -> BatchResponse:
        texts = [cast(str, tokenizer.decode(tokens)) for tokens in self._tokens]
        stats = self._stats()
        if self._verbose:
            print(f"[batch_generate] Finished processing {len(texts)}/{len(texts)}")
            print(f"[batch_generate] Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec")
            print(
                f"[batch_generate] Generation: {stats.generation_tokens} tokens, {stats.decode_tps:.3f} tokens-per-sec"
            )
            print(f"[batch_generate] Peak memory: {stats.peak_memory:.3f} GB")
        return BatchResponse(texts, stats, caches, self._tokens if token_ids else None, self._logprobs)

    def _stats(self) -> Figures:
        last = list(self._ended.values())
        wall = time.perf_counter() - self._began
        return Figures(
            prompt_tokens=sum(stats.prompt_tokens for stats in last),
            prompt_time=self._reading,
            generation_tokens=sum(stats.generation_tokens for stats in last),
            generation_steps=sum(stats.rounds for stats in last),
            decode_time=wall - self._reading,
            wall_time=wall,
            peak_memory=max((stats.memory.peak for stats in last), default=0) / 1e9,
            drafted=sum(stats.drafted for stats in last),
            accepted=sum(stats.accepted for stats in last),
        )
