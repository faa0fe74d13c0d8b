"""mlx-lm's generation functions over a pair: one response per token, in mlx-lm's shape."""

from collections.abc import Callable, Iterable, Iterator

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.choosing import Drafts
from mtp_mlx.generation import Progress, Response, generation, solo, wired
from mtp_mlx.options import DEFAULT_MAX_TOKENS, DEFAULT_PREFILL_STEP, Options, Prompt
from mtp_mlx.penalties import Penalties
from mtp_mlx.sampling import Sampler
from mtp_mlx.types import Pair


def stream_generate(
    pair: Pair,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    *,
    depth: int | str = "auto",
    sampler: Sampler | Callable[[mx.array], mx.array] | None = None,
    penalties: Penalties | None = None,
    logits_processors: Iterable[Callable[[mx.array, mx.array], mx.array]] | None = None,
    seed: int | None = None,
    drafts: Drafts | None = None,
    lookup: bool = True,
    prediction: Prompt | None = None,
    prefill_step_size: int = DEFAULT_PREFILL_STEP,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Iterator[Response]:
    """Generate text, one response per token.

    `prompt` is text or token ids. `max_tokens` -1 means up to the model's context. `depth` is the number of
    tokens to draft per round, 0 for plain decoding, "auto" for what measures fastest.

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
    progress = prompt_progress_callback or _ignore
    options = Options(
        max_tokens,
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
    with wired():
        for event in solo(generation(pair, tokenizer, prompt, options)):
            if isinstance(event, Progress):
                progress(event.done, event.total)
            else:
                yield from event


def generate(pair: Pair, tokenizer: TokenizerWrapper, prompt: Prompt, verbose: bool = False, **options: object) -> str:
    """The whole text at once; `options` are those of `stream_generate`. `verbose` prints it as it comes."""
    text = ""
    for response in stream_generate(pair, tokenizer, prompt, **options):  # type: ignore[arg-type]
        if verbose:
            print(response.text, end="", flush=True)
        text += response.text
    if verbose:
        print()
    return text


def _ignore(done: int, total: int) -> None:
    """Nobody watches the prompt being read."""
