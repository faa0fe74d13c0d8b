"""mlx-lm's generation functions over a pair: its names, arguments and prompt caches, and one response per token."""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple, Self

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.cache import QuantisedCache
from mtp_mlx.choosing import Drafts
from mtp_mlx.draft_model import DraftModel
from mtp_mlx.errors import RequestError
from mtp_mlx.generation import Progress, Response, check_lengths, encode, generation, solo, wired
from mtp_mlx.model import Model, pair_of
from mtp_mlx.options import DEFAULT_MAX_TOKENS, DEFAULT_PREFILL_STEP, Options, Prompt
from mtp_mlx.penalties import Penalties
from mtp_mlx.prompt_cache import PromptCache
from mtp_mlx.sampling import Sampler
from mtp_mlx.types import Pair

DEFAULT_QUANTIZED_KV_START = 5000  # mlx-lm's
Event = Progress | list[Response]


def stream_generate(
    model: Model | Pair,
    tokenizer: Any,
    prompt: Prompt,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    draft_model: Model | Pair | None = None,
    stream: Any = None,
    *,
    sampler: Sampler | Callable[[mx.array], mx.array] | None = None,
    logits_processors: Iterable[Callable[[mx.array, mx.array], mx.array]] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = DEFAULT_PREFILL_STEP,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    prompt_progress_callback: Callable[[int, int], object] | None = None,
    input_embeddings: mx.array | None = None,
    num_draft_tokens: int | None = None,
    depth: int | str = "auto",
    penalties: Penalties | None = None,
    seed: int | None = None,
    drafts: Drafts | None = None,
    lookup: bool = True,
    prediction: Prompt | None = None,
) -> Generator[Response, None, None]:
    """Generate text, one response per token. The arguments down to `num_draft_tokens` are mlx-lm's.

    `model` is what `mtp_mlx.load` returns, `tokenizer` mlx-lm's or one of transformers, `prompt` is text or token ids.
    `max_tokens` -1 means up to the model's context. `draft_model`, a smaller model of the same family that
    `mtp_mlx.load` returned, drafts in place of the model's own drafter, `num_draft_tokens` at a time; without one that
    number means nothing, as in mlx-lm. `stream` is where MLX computes.

    `prompt_cache` is a list of mlx-lm's caches, which holds what was read before; it is written when the iterator is
    exhausted, closed or given up, and holds the prompt and all tokens that it has given then. With `kv_bits` keys and
    values are quantised from the first token on, so it takes `quantized_kv_start=0` unless the text ends before that.
    `max_kv_size` is no less than the text can become, `input_embeddings` are refused.

    `depth` is the number of tokens to draft per round, 0 for plain decoding, "auto" for what measures fastest.

    `sampler` is `Greedy()` (the default), a `Sample(...)`, or any sampler of mlx-lm's kind; `penalties` are computed
    with the round, `logits_processors` are callables of mlx-lm's kind and see each row with its own text before it.
    With a `seed` the text is the same at every depth and on every run, and "auto" chooses depths without a clock;
    without one, depths may follow a clock and sampled text may differ from run to run. `drafts` says how drafts are
    drawn at a temperature, see `mtp_mlx.Rules`: with a seed the default is "coupled", without one the sampler itself,
    whose drafts are accepted a little more often; the text then depends on what was drafted, its distribution does not.

    With `lookup` and depth "auto", what follows an earlier occurrence of the text's latest tokens is tried in place of
    the drafter's proposals where that pays; `prediction` is text that the output is expected to resemble, tried in the
    same way at every depth but 0.

    Raises RequestError for an empty prompt, one that does not fit the model's context or memory, or a bad option.
    """
    if draft_model is not None and num_draft_tokens is not None and depth == "auto":
        depth = num_draft_tokens
    prefill = max_tokens == 0 and tokenizer is _NO_TEXT
    options = Options(
        1 if prefill else max_tokens,
        depth,
        sampler,
        penalties,
        logits_processors,
        seed,
        drafts,
        lookup,
        prediction,
        prefill_step_size,
    )
    words: Any = tokenizer if isinstance(tokenizer, TokenizerWrapper | _NoText) else TokenizerWrapper(tokenizer)
    pair = pair_of(model)
    with pair.agreed.asked("a text"):
        ids = encode(words, prompt)
        pair = _drafting(pair, draft_model)
        cache = None if prompt_cache is None else PromptCache(pair, prompt_cache)
        storage = _Storage(kv_bits, kv_group_size, quantized_kv_start, max_kv_size, input_embeddings is not None)
        pair = storage.applied(pair, cache, len(ids), options.max_tokens)
    text = pair.agreed.together(solo(generation(pair, words, ids, options, cache)))
    with wired(), closing(_on(stream, text)) as events:
        yield from _given(events, cache, prompt_progress_callback, prefill)


def generate_step(
    prompt: list[int] | mx.array,
    model: Model | Pair,
    stream: Any = None,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    **options: Any,
) -> Generator[tuple[int, mx.array], None, None]:
    """Tokens and their log-probabilities (V,), as mlx-lm's function of that name: no text, and no token ends it.

    `options` are the keywords of `stream_generate`. With `max_tokens` 0 the prompt is read into `prompt_cache`, and
    that is all.
    """
    for response in stream_generate(model, _NO_TEXT, prompt, max_tokens, None, stream, **options):
        yield response.token, response.logprobs


def generate(model: Model | Pair, tokenizer: Any, prompt: Prompt, verbose: bool = False, **options: Any) -> str:
    """The whole text; `options` are those of `stream_generate`. `verbose` prints it as it comes, and figures."""
    text, last = "", None
    if verbose:
        print("=" * 10)
    for last in stream_generate(model, tokenizer, prompt, **options):
        if verbose:
            print(last.text, end="", flush=True)
        text += last.text
    if verbose and last:
        print("\n" + "=" * 10)
        print(_figures(last) if text else "No text generated for this prompt")
    return text


def _figures(last: Response) -> str:
    """mlx-lm's lines."""
    return (
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {last.peak_memory:.3f} GB"
    )


def _given(
    events: Iterable[Event], cache: PromptCache | None, progress: Callable[[int, int], object] | None, prefill: bool
) -> Generator[Response, None, None]:
    """The responses among what happens to a text; none of them where only its prompt is to be read."""
    for event in events:
        if isinstance(event, list):
            yield from cache.hand_out(event) if cache else event
            continue
        if progress:
            progress(event.done, event.total)
        if prefill and event.done == event.total:
            return


class _NoText:
    """In place of a tokenizer where nobody wants text."""

    eos_token_ids: frozenset[int] = frozenset()
    bos_token = None
    last_segment = ""

    @property
    def detokenizer(self) -> Self:
        return self

    def add_token(self, token: int) -> None:
        """Nobody reads it."""

    def finalize(self) -> None:
        """There is nothing to end."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise RequestError(f"generate_step has no tokenizer for {text[:40]!r}; give token ids")


_NO_TEXT = _NoText()


def _drafting(pair: Pair, draft_model: Model | Pair | None) -> Pair:
    """A pair whose drafter is that model."""
    if draft_model is None:
        return pair
    small, target = pair_of(draft_model, "draft_model").target, pair.target
    if type(small) is not type(target) or small.vocabulary != target.vocabulary:
        raise RequestError(
            f"draft_model is a {type(small).__module__} of {small.vocabulary} tokens, the model a "
            f"{type(target).__module__} of {target.vocabulary}; give a smaller model of the same family"
        )
    # The same drafter for all texts: what has been traced and measured belongs to it.
    known: dict[int, DraftModel] = pair.measured.setdefault("draft models", {})
    return replace(pair, drafter=known.setdefault(id(small), DraftModel(small)))


class _Storage(NamedTuple):
    """What mlx-lm's callers say of keys and values. All of it is done exactly or refused."""

    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    max_kv_size: int | None
    embedded: bool  # whether the prompt comes as embeddings

    def applied(self, pair: Pair, cache: PromptCache | None, prompt: int, max_tokens: int) -> Pair:
        """The pair that writes a text in this way, after a prompt of so many tokens behind those in the cache."""
        if self.embedded:
            raise RequestError(
                "input_embeddings cannot be read, the drafter needs tokens; give the prompt as token ids"
            )
        offset = cache.offset if cache else 0
        length = offset + prompt if prompt else 0
        end = length + check_lengths(length, max_tokens, pair.target.context)
        if self.max_kv_size is not None and end > self.max_kv_size:
            raise RequestError(
                f"the text may become {end} tokens long, more than max_kv_size {self.max_kv_size}, and nothing of it "
                "can be forgotten without changing what comes; leave max_kv_size out or ask for fewer max_tokens"
            )
        bits = self._bits(pair, cache.bits if cache else None, offset, end)
        if bits == pair.kv_bits:
            return pair
        pair = replace(pair, kv_bits=bits)
        self._check(pair)
        if cache:
            cache.pair = pair
        return pair

    def _bits(self, pair: Pair, held: int | None, offset: int, end: int) -> int | None:
        """How many bits keys and values have in a text that begins at `offset`, where the cache has `held` bits."""
        given = pair.kv_bits or held
        if given and self.kv_bits not in (None, given):
            whose = "the model was loaded with" if pair.kv_bits else "the prompt cache has"
            raise RequestError(f"kv_bits is {self.kv_bits}, {whose} {given}; leave kv_bits out")
        if given or self.kv_bits is None or end < self.quantized_kv_start:
            return given
        if offset < self.quantized_kv_start:
            raise RequestError(
                f"kv_bits {self.kv_bits} from token {self.quantized_kv_start} on would begin within this text, which "
                f"may become {end} tokens long; give quantized_kv_start=0"
            )
        return self.kv_bits

    def _check(self, pair: Pair) -> None:
        """Raises RequestError where keys and values are not to be had in such bits."""
        if pair.kv_bits not in (4, 8):
            raise RequestError(f"keys and values cannot be held in {pair.kv_bits} bits; give kv_bits 4 or 8")
        try:
            layers = pair.make_cache().layers
        except ValueError as error:
            raise RequestError(f"keys and values of this model: {error}; leave kv_bits out") from error
        groups = {layer.group for layer in layers if isinstance(layer, QuantisedCache)}
        if self.kv_bits and groups != {self.kv_group_size}:
            raise RequestError(
                f"kv_group_size is {self.kv_group_size}, this model's keys and values are quantised in groups of "
                f"{', '.join(map(str, sorted(groups)))}; give that"
            )


def _on(stream: Any, slices: Generator[Event, None, None]) -> Generator[Event, None, None]:
    """Slices that are computed on a stream of MLX's, which is not that of whoever asks for them."""
    if stream is None:
        yield from slices
        return
    try:
        while True:
            with mx.stream(stream):
                event = next(slices, None)
            if event is None:
                return
            yield event
    finally:
        with mx.stream(stream):
            slices.close()
