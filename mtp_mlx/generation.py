"""A text written in slices that others can come between: a chunk of the prompt, or the tokens of one round."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, cast

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import maybe_set_recommended_wired_limit

from mtp_mlx.admission import Admission, admit
from mtp_mlx.batch import Round
from mtp_mlx.choosing import Callables, Drafts, Rules
from mtp_mlx.copying import Copies
from mtp_mlx.depth import Depth, choose_depth
from mtp_mlx.errors import RequestError
from mtp_mlx.ngram import NOBODY
from mtp_mlx.options import Options, Prompt
from mtp_mlx.penalties import Penalties
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.programs import compiles
from mtp_mlx.prompt_cache import PromptCache
from mtp_mlx.prompts import check_text, lacks_special
from mtp_mlx.rounds import next_round
from mtp_mlx.sampling import Greedy, Sample, Sampler, check_seed
from mtp_mlx.sequence import Sequence
from mtp_mlx.stats import Memory, Stats
from mtp_mlx.types import Drafter, Pair

_log = logging.getLogger(__name__)

Origin = Literal["plain", "accepted", "copied", "correction", "bonus"]


@dataclass
class Response(GenerationResponse):
    """mlx-lm's response, and where the token comes from.

    `origin` is "accepted" for a draft that was kept, "copied" for one that came from earlier or predicted text,
    "correction" for the target's token in place of a wrong draft, "bonus" for its token after a draft that was right
    throughout, "plain" where nothing was drafted.
    """

    origin: Origin = "plain"
    stats: Stats = field(default_factory=lambda: Stats(0))


class Progress(NamedTuple):
    """How much of a prompt is known to the model."""

    done: int
    total: int
    cached: int = 0  # of it, what had been read before


class Writing:
    """A text whose prompt has been read: it wants rounds, and makes responses of what they bring."""

    def __init__(
        self,
        sequence: Sequence,
        policy: Depth,
        stats: Stats,
        emitter: "_Emitter",
        options: Options,
        copies: Copies | None,
    ):
        self.sequence, self.options, self.copies = sequence, options, copies
        self._policy, self._stats, self._emitter = policy, stats, emitter

    def begin(self, seconds: float) -> None:
        """The first round is there, so many seconds after the request."""
        self._stats = replace(self._stats, ttft_seconds=seconds)

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self._emitter.budget - self._emitter.emitted

    @property
    def finished(self) -> bool:
        return self._emitter.finished

    @property
    def solitary(self) -> bool:
        """Whether it has to be written alone: a seeded text that depends on its drafts, and so on its depths."""
        return self.options.seed is not None and isinstance(self.options.drafts, Sample)

    def round(self) -> "Turn":
        """A round of the text alone."""
        (result,) = next_round(self.sequence.batch, self._policy, self.left, [self.copies])
        return self.cut(result, self._policy)

    def cut(self, result: Round | Exception, depth: Depth) -> "Turn":
        """The round up to a stop. Before any text leaves the batch, this is done for all."""
        if isinstance(result, Round):
            result = self._emitter.until_stop(result)
            self.sequence.keep(len(result.tokens))
        return Turn(result, depth)

    def take(self, turn: "Turn") -> list[Response]:
        """What a round has brought. Raises what went wrong in it."""
        if isinstance(turn.result, Exception):
            raise turn.result
        result = turn.result
        warned = self._stats.alarm
        self._stats = self._stats.after(result, turn.depth, self.sequence.nbytes, mx.get_peak_memory())
        if self._stats.alarm and not warned:
            _log.warning(self._stats.alarm)
        return list(self._emitter.responses(result, self._stats))


class Turn(NamedTuple):
    """What a round has brought to a text, up to a stop."""

    result: Round | Exception
    depth: Depth  # who chose how deep it was


Slice = Progress | Writing | list[Response]
Generation = Generator[Slice, Turn | None, None]


def generation(
    pair: Pair,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    options: Options,
    prefixes: Prefixes | PromptCache | None = None,
    marks: Iterable[int] = (),
) -> Generation:
    """The text that follows a prompt, slice by slice. `options` are those of `mtp_mlx.stream_generate`.

    Once the prompt has been read it gives a `Writing` and is sent the `Turn` that was run for it, for one round after
    the other; `solo` does that. What `prefixes`, of the same pair, have of the prompt is not read again, and what the
    text leaves is stored there; `marks` are numbers of its tokens after which other prompts may differ.
    """
    began = time.perf_counter()
    ids = pair.agreed.ids(encode(tokenizer, prompt))
    # At depth 0 nobody has to keep a drafter up to date, unless others go on from here.
    running = pair if prefixes or options.depth != 0 else replace(pair, drafter=NOBODY)
    prefixes = prefixes or Prefixes(running, 0)
    with pair.agreed.asked(_manner(pair, options, prefixes)):
        admission = _admitted(running, ids, options, prefixes)
        chooser = _chooser(pair, tokenizer, options)
    budget = pair.agreed.least(admission.tokens)
    copies = _copies(pair, tokenizer, ids, options)
    seed = _seed(options)
    mx.reset_peak_memory()
    with _policy(pair, options) as policy, prefixes.open(ids, chooser, seed, admission.promised) as text:
        if options.grammar:
            text.sequence.grammar = options.grammar.start(thinking=options.thinking, frees=options.frees)
        yield Progress(text.cached, len(ids), text.cached)
        for done in text.read(options.prefill_step_size, marks):
            yield Progress(done, len(ids), text.cached)
        memory = Memory(target=pair.target.nbytes, drafter=pair.drafter.nbytes)
        stats = Stats(len(ids), text.cached, memory=memory, compiled=compiles())
        emitter = _Emitter(tokenizer, options.stops, budget)
        writing = Writing(text.sequence, policy, stats, emitter, options, copies)
        try:
            turn = yield writing
            writing.begin(time.perf_counter() - began)
            yield Progress(len(ids), len(ids), text.cached)
            while not writing.finished:
                assert turn is not None, "a text that wants a round was given none"
                yield writing.take(turn)
                if not writing.finished:
                    turn = yield writing
        finally:
            text.sequence.batch.release([text.sequence])  # what it leaves is stored from there


def solo(text: Generation) -> Generator[Progress | list[Response], None, None]:
    """A text that no other is written beside: its own rounds, one after the other."""
    turn: Turn | None = None
    with closing(text):
        while True:
            try:
                event = text.send(turn)
            except StopIteration:
                return
            turn = event.round() if isinstance(event, Writing) else None
            if not isinstance(event, Writing):
                yield event


def _admitted(pair: Pair, ids: list[int], options: Options, prefixes: Prefixes | PromptCache) -> Admission:
    """How many tokens may follow a prompt; room for them is made.

    Raises RequestError where they cannot be served, BusyError where they can be once other texts have ended.
    """
    check_tokens(ids, pair.target.vocabulary)
    if options.prefill_step_size < 1:
        raise RequestError(f"prefill step size {options.prefill_step_size} must be at least 1")
    length = prefixes.offset + len(ids)
    allowed = check_lengths(length, options.max_tokens, pair.target.context)
    endless, evictable = options.max_tokens == -1, prefixes.evictable
    admission = admit(pair, length, allowed, endless=endless, evictable=evictable, claims=prefixes.claims)
    prefixes.release(admission.short)
    return admission


def _manner(pair: Pair, options: Options, prefixes: Prefixes | PromptCache) -> str:
    """What several machines have to be told alike, or they would compute other blocks. Prompts and seeds may differ."""
    sampler = options.sampler or Greedy()
    named = sampler if isinstance(sampler, Greedy | Sample) else "a callable"  # whose repr may hold its address
    processed = bool(options.logits_processors)
    how = (options.max_tokens, options.depth, named, processed, options.penalties, options.drafts, options.lookup)
    seeded = options.seed is not None
    return repr((*how, seeded, options.prefill_step_size, sorted(options.stops), pair.kv_bits, prefixes.offset))


def _seed(options: Options) -> int:
    """The seed of a text. MLX's random state is left to samplers of mlx-lm's kind, which draw from it."""
    if options.seed is not None:
        return options.seed
    return draw_seed() if isinstance(options.sampler, Sample) else 0


def _copies(pair: Pair, tokenizer: TokenizerWrapper, ids: list[int], options: Options) -> Copies | None:
    """Earlier and predicted text that may be tried as drafts."""
    predicted = [] if options.prediction is None else encode(tokenizer, options.prediction, special=False)
    predicted = pair.agreed.ids(predicted)
    check_tokens(predicted, pair.target.vocabulary)
    wanted = options.depth != 0 and (predicted or (options.lookup and options.depth == "auto"))
    return Copies(ids, predicted) if wanted else None


def _chooser(pair: Pair, tokenizer: TokenizerWrapper, options: Options) -> Rules | Callables:
    seed, sampler, drafts = options.seed, options.sampler, options.drafts
    if seed is not None:
        check_seed(seed)
    if drafts is None:
        drafts = sampler if seed is None and isinstance(sampler, Sample) else "coupled"
    stops = frozenset(tokenizer.eos_token_ids) | options.stops
    return choose_rules(pair, sampler, options.penalties, options.logits_processors, drafts, stops)


@dataclass(eq=False)
class _Measured:
    """What a clock has measured of a pair, for one text after the other."""

    drafter: Drafter  # a copy of a pair may have another one
    policy: Depth
    busy: bool = False


@contextmanager
def _policy(pair: Pair, options: Options) -> Iterator[Depth]:
    """The policy of a text. What was measured serves the next texts too; each that is written meanwhile has its own."""
    limit = pair.drafter.limit
    if options.depth != "auto" or options.seed is not None:
        yield choose_depth(options.depth, limit, reproducible=options.seed is not None)
        return
    known: list[_Measured] = pair.measured.setdefault("auto", [])
    ours = [measured for measured in known if measured.drafter is pair.drafter]
    mine = next((measured for measured in ours if not measured.busy), None)
    if mine is None:
        mine = _Measured(pair.drafter, deepcopy(ours[0].policy) if ours else choose_depth("auto", limit))
        known.append(mine)
    mine.busy = True
    try:
        mine.policy.begin()
        yield mine.policy
    finally:
        mine.busy = False


def choose_rules(
    pair: Pair,
    sampler: Sampler | Callable[[mx.array], mx.array] | None,
    penalties: Penalties | None,
    logits_processors: Iterable[Callable[[mx.array, mx.array], mx.array]] | None,
    drafts: Drafts,
    stops: frozenset[int],
) -> Rules | Callables:
    """How tokens are chosen, by what a caller gave. Raises RequestError for what does not go together."""
    processors = tuple(logits_processors or ())
    chosen = penalties or Penalties()
    chosen.check(pair.target.vocabulary)
    if drafts not in ("coupled", "argmax") and not isinstance(drafts, Sample):
        raise RequestError(f'drafts {drafts!r} is neither "coupled" nor "argmax" nor a Sample')
    if sampler is None or sampler is greedy_sampler:
        sampler = Greedy()
    if isinstance(sampler, Greedy | Sample):
        rules = Rules(sampler, chosen, drafts)
        return Callables(rules.sampler, (*_as_processors(chosen), *processors), stops) if processors else rules
    return Callables(sampler, (*_as_processors(chosen), *processors), stops)


def _as_processors(penalties: Penalties) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """Penalties for a chooser that is asked row by row."""
    if not penalties:
        return []

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = tokens[-penalties.reach :] if penalties.reach else tokens[:0]
        missing = mx.full((penalties.reach - recent.size,), -1, mx.int32)
        return penalties(logits[None], mx.concatenate([missing, recent])[None, None])[0]

    return [process]


def draw_seed() -> int:
    """A seed from MLX's random state."""
    return cast(int, mx.random.randint(0, 2**31 - 1).item())


class _Emitter:
    """Turns rounds into responses: finds the stop, decodes the text, labels every token's origin."""

    def __init__(self, tokenizer: TokenizerWrapper, stops: frozenset[int], budget: int):
        self.stops = stops.union(tokenizer.eos_token_ids)
        self.detokenizer = tokenizer.detokenizer
        self.budget = budget
        self.emitted = 0
        self.finished = False

    def until_stop(self, result: Round) -> Round:
        """The round up to and including the first stop token, or to the last token that may come."""
        result = result.first(self.budget - self.emitted)
        for i, token in enumerate(result.tokens):
            if token in self.stops:
                return result.first(i + 1)
        return result

    def responses(self, result: Round, stats: Stats) -> Iterator[Response]:
        for i, token in enumerate(result.tokens):
            self.emitted += 1
            stopped = token in self.stops
            self.finished = stopped or self.emitted == self.budget
            if not stopped:
                self.detokenizer.add_token(token)
            if self.finished:
                self.detokenizer.finalize()
            yield Response(
                text=self.detokenizer.last_segment,
                token=token,
                logprobs=result.logprobs[i],
                from_draft=i < result.accepted,
                prompt_tokens=stats.prompt_tokens,
                prompt_tps=stats.prompt_tps,
                generation_tokens=self.emitted,
                generation_tps=stats.generation_tps,
                peak_memory=stats.memory.peak / 1e9,
                finish_reason=("stop" if stopped else "length") if self.finished else None,
                origin=_origin(result, i),
                stats=stats,
            )


def _origin(result: Round, i: int) -> Origin:
    if i < result.accepted:
        return "copied" if result.copied else "accepted"
    if not result.drafted:
        return "plain"
    return "bonus" if result.accepted == result.drafted else "correction"


def encode(tokenizer: TokenizerWrapper, prompt: Prompt, special: bool = True) -> list[int]:
    """Token ids of a prompt. Special tokens are added unless the text begins with BOS, as in mlx-lm, or not at all."""
    if isinstance(prompt, mx.array):
        if prompt.ndim != 1:
            raise RequestError(f"the prompt is an array of shape {prompt.shape}; give one row of token ids")
        return cast(list[int], prompt.tolist())
    if isinstance(prompt, str):
        check_text(prompt)
        special = special and lacks_special(tokenizer, prompt)
        ids: list[int] = tokenizer.encode(prompt, add_special_tokens=special) if prompt else []
        return ids
    return prompt


def check_tokens(ids: list[int], vocabulary: int) -> None:
    """Raises RequestError for an id that is not in the model's vocabulary; MLX would read beyond the table."""
    for token in ids:
        if not isinstance(token, int):
            raise RequestError(f"the prompt holds {token!r}; give text or whole token ids")
        if not 0 <= token < vocabulary:
            raise RequestError(
                f"the prompt holds token {token}, the model's vocabulary ends at {vocabulary - 1}; the tokenizer "
                "belongs to another model"
            )


def check_lengths(prompt_tokens: int, max_tokens: int, context: int) -> int:
    """How many tokens may be generated. Raises RequestError where the answer is none."""
    if not isinstance(max_tokens, int):
        raise RequestError(f"max tokens is {max_tokens!r}; give a whole number")
    if prompt_tokens == 0:
        raise RequestError("the prompt is empty; give some text or at least one token")
    if prompt_tokens >= context:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens and the model's context is {context}; "
            f"shorten it to at most {context - 1}"
        )
    if max_tokens == 0 or max_tokens < -1:
        raise RequestError(f"max tokens is {max_tokens}; give at least 1, or -1 for as many as the context holds")
    room = context - prompt_tokens
    return room if max_tokens == -1 else min(max_tokens, room)


@contextmanager
def wired() -> Iterator[None]:
    """Keep the weights resident on a Mac while generating; the limit goes back to what it was."""
    before = maybe_set_recommended_wired_limit()
    if before is None:  # not a Mac
        yield
        return
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
