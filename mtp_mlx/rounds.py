"""The one loop: draft -> verify -> accept -> commit -> advance, until nobody asks for more.

Plain decoding is the same loop with nothing drafted. A round is built lazily and read once by the host.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import mlx.core as mx

from mtp_mlx import steps
from mtp_mlx.cache import MAX_BLOCK
from mtp_mlx.choosing import Callables, Choice, Context, Rules, read
from mtp_mlx.clock import Clock, Times
from mtp_mlx.copying import Copies
from mtp_mlx.depth import Depth, Outcome
from mtp_mlx.errors import MTPError, RequestError
from mtp_mlx.programs import Step
from mtp_mlx.types import Draft, Drafter, Pair, Span, Target

if TYPE_CHECKING:
    from mtp_mlx.grammar import GrammarState

Progress = Callable[[int, int], None]  # prompt tokens read so far, all prompt tokens

# A write copies a buffer that something in flight still reads. So the target's writes wait for a draft that reads
# its buffers, unless those are so small, in bytes, that copying them takes less time than waiting.
COPIED = 2**24
UNTOLD = 256  # blocks after which a drafter is told of them even though it is not asked
WARM_UP = 2  # rounds whose phases are not timed: they are still being traced
SPLIT_EVERY = 8  # of the others, one in so many waits between draft and verify to time them apart


class Round(NamedTuple):
    """What one round brought."""

    tokens: list[int]  # the accepted drafts, then one token of the target's own
    drafted: int
    copied: bool  # the drafts were a copy of earlier text
    accepted: int
    likely: bool  # whether the first draft was the target's most probable token, whatever was drawn
    logprobs: mx.array  # (len(tokens) or more, V)
    times: Times

    def first(self, n: int) -> "Round":
        """The round as if it had ended with its n-th token: a stop inside an accepted run."""
        return self._replace(tokens=self.tokens[:n], accepted=min(self.accepted, n))


class _Block(NamedTuple):
    """Rows that the target has read and nobody has committed yet."""

    tokens: mx.array  # (B, L)
    hidden: mx.array  # (B, L, D)
    start: int | None  # where it stands, if it is a part of a prompt
    kept: int  # how many of the rows are to be committed


class Sequence:
    """One sequence being decoded: the target's cache, the drafter's state, and the text so far.

    The newest token is the only one that no block has read yet. The rows of the newest block are committed when the
    next one is begun; until then `keep` can still cut it shorter.
    """

    def __init__(self, pair: Pair, chooser: Rules | Callables, seed: int = 0):
        self.pair = pair
        self.chooser = chooser
        self.seed = mx.array([seed], mx.uint32)
        self.cache = pair.make_cache()
        self.state = pair.drafter.start(self.cache)
        self.text: list[int] = []
        self.grammar: GrammarState | None = None  # what the next text has to be; set before its first round
        self.ready = False  # whether the drafter has been told of the token before the newest one
        self._block: _Block | None = None
        self._untold: list[tuple[mx.array, mx.array]] = []  # tokens and hiddens that the drafter has yet to learn of

    @property
    def length(self) -> int:
        """Tokens before the newest one, all of them read."""
        return len(self.text) - 1

    def prefill(self, prompt: list[int], step: int, progress: Progress) -> None:
        """Read a prompt, or what follows in a conversation, up to its last token, which the first round will read.

        `step` tokens are read at a time.
        """
        for done in self.chunks(prompt, step):
            progress(done, len(prompt))

    def chunks(self, prompt: list[int], step: int) -> Iterator[int]:
        """The same chunk by chunk: how many tokens of the prompt have been read, 0 first.

        Who stops asking leaves a sequence that goes on from there.
        """
        self.commit()
        unread = self.text[-1:] + prompt
        self.text = self.text or prompt[:1]
        self.cache.reserve(self.length + len(unread))
        yield 0
        for begin in range(0, len(unread) - 1, step):
            chunk = unread[begin : min(begin + step, len(unread) - 1)]
            tokens = mx.array(chunk, mx.int32)[None]  # (1, L)
            output = self.pair.target(tokens, self.cache, Span(self.length, len(chunk)))
            self.ready = self.pair.drafter.reads_prompt
            self._block = _Block(tokens, output.hidden, self.length, len(chunk))
            self.text = self.text + unread[begin + 1 : begin + 1 + len(chunk)]  # so that reading can be broken off
            self.commit()
            mx.eval(self.cache.arrays(), self.state)
            mx.clear_cache()
            yield begin + len(chunk)

    def round(self, drafts: int | list[int], split: bool = False) -> Round:
        """Let the drafter propose so many tokens, or propose these, and verify them.

        `split` waits in between, so that the phases can be timed.
        """
        assert self.text, "a prompt comes first"
        clock = Clock(split)
        self.commit(tell=drafts != 0 and isinstance(drafts, int))
        clock.wait(self.cache.arrays(), self.state)

        draft = self._draft(drafts)  # (B, k)
        clock.wait(draft, needed=self.pair.drafter.reads(self.cache) > COPIED and draft.tokens.size > 0)

        block = mx.concatenate([mx.array([self.text[-1:]], mx.int32), draft.tokens], axis=1)  # (B, k+1)
        hidden, choice = self._verify(block, draft, clock)

        if not choice.sound:
            raise self._unsound()
        if self.grammar is not None:
            self.grammar.advance(choice.tokens)
        kept, k = len(choice.tokens), draft.tokens.shape[1]
        self._block = _Block(block, hidden, None, kept)
        self.text += choice.tokens
        self.ready = True
        copied = not isinstance(drafts, int)
        return Round(choice.tokens, k, copied, kept - 1, choice.likely, choice.logprobs, clock.times())

    def keep(self, n: int) -> None:
        """Let the newest round have ended with its n-th token; those after it have never been written."""
        assert self._block is not None and 0 < n <= self._block.kept, f"the newest round has no token {n}"
        del self.text[len(self.text) - (self._block.kept - n) :]
        self._block = self._block._replace(kept=n)

    def _draft(self, drafts: int | list[int]) -> Draft:
        if not isinstance(drafts, int):
            self.cache.reserve(self.length + len(drafts) + 1)
            return Draft(mx.array([drafts], mx.int32))
        self.cache.reserve(self.length + drafts + 1)
        if drafts == 0:
            return Draft(mx.zeros((1, 0), mx.int32))
        assert self.ready, "a drafter that has not been told of the text has nothing to draft from"
        last = mx.array(self.text[-1:], mx.int32)
        fixed = (drafts, self.chooser.rules, self.pair.target.vocabulary)
        tokens, *laws = self._run(steps.propose, self.pair.drafter, fixed, self.state, last, self._context())
        return Draft(self.pair.agreed.tokens(tokens), *laws)

    def _verify(self, block: mx.array, draft: Draft, clock: Clock) -> tuple[mx.array, Choice]:
        """The hidden of every row, (B, k+1, D), and the target's choice; this is where the host waits and reads."""
        bound = self.grammar is not None and not self.grammar.free
        if isinstance(self.chooser, Callables) or bound:
            return self._verify_apart(block, draft, clock)
        laws = [] if draft.logprobs is None else [draft.logprobs]
        report, logprobs, hidden = self._run(steps.judge, self.pair.target, self.chooser, block, laws, self._context())
        report = self.pair.agreed.tokens(report)
        clock.evaluate(report, logprobs, hidden, self.cache.arrays(), self.state)
        return hidden, read(report, logprobs)

    def _verify_apart(self, block: mx.array, draft: Draft, clock: Clock) -> tuple[mx.array, Choice]:
        """The same where the host has a say in the choice: it looks at the drafts while the target reads them."""
        mx.async_eval(draft.tokens)  # by itself, or its end would be the target's
        logits, hidden = self._run(steps.forward, self.pair.target, None, block)
        masks = self._masks(draft.tokens, (logits, hidden, self.cache.arrays(), self.state), clock)
        if isinstance(self.chooser, Callables):
            clock.evaluate(logits, hidden, draft.tokens, self.cache.arrays(), self.state)
            drafted = cast(list[int], draft.tokens[0].tolist())
            rows = None if masks is None else masks[0]
            return hidden, self.chooser.choose(self.seed, self.text, drafted, logits[0], rows, self.pair.agreed)
        laws = [] if draft.logprobs is None else [draft.logprobs]
        arrays = (logits, block, laws, self._context(), [] if masks is None else [masks])
        report, logprobs = self._run(steps.decide, self.pair.target, self.chooser, *arrays)
        report = self.pair.agreed.tokens(report)
        clock.evaluate(report, logprobs, hidden, self.cache.arrays(), self.state)
        return hidden, read(report, logprobs)

    def _masks(self, drafts: mx.array, pending: Any, clock: Clock) -> mx.array | None:
        """What the grammar allows at every row, computed while the device works on `pending`."""
        if self.grammar is None or self.grammar.free:
            return None
        mx.async_eval(pending)
        clock.pause(drafts)
        return self.grammar.masks(cast(list[int], drafts[0].tolist()))

    def _unsound(self) -> MTPError:
        if self.grammar is not None and not self.grammar.free:
            return RequestError(
                f"after {self.length} tokens the grammar leaves nothing that can be chosen; it may lead to a dead end, "
                "or a bias forbids what it asks for"
            )
        return MTPError(
            f"the model's logits after {self.length} tokens are not finite; the checkpoint or its "
            "quantisation is damaged, or a penalty or bias is out of all proportion"
        )

    def commit(self, tell: bool = True) -> None:
        """Keep what is right of the newest block, in the target's cache and in the drafter's state.

        A drafter that is not asked next is told later, of many rows at once: plain decoding must not pay for it.
        """
        if self._block is not None:
            tokens, hidden, start, kept = self._block
            later = self.ready and bool(self._untold or not tell)
            fixed = (kept == tokens.shape[1], self.ready and not later, start)
            arrays = (self.state, tokens, hidden, mx.array([kept], mx.int32))
            if start is None:
                state = self._run(steps.keep, self.pair.drafter, fixed, *arrays)
            else:  # a prompt is read once, nothing of it would ever be replayed
                state = steps.keep(self.pair.drafter, self.cache, fixed, *arrays)
            self.state, self._block = tuple(state), None
            if later and self.pair.drafter.limit:
                self._untold.append((tokens[:, :kept], hidden[:, :kept]))
        if self._untold and (tell or len(self._untold) >= UNTOLD):
            self._catch_up()

    def _catch_up(self) -> None:
        """Tell the drafter of the rows that it has not been told of; they end where the newest token stands."""
        tokens = mx.concatenate([tokens for tokens, _ in self._untold], axis=1)
        hidden = mx.concatenate([hidden for _, hidden in self._untold], axis=1)
        rows = tokens.shape[1]
        span = Span(self.length - rows, rows)
        self.state = self.pair.drafter.advance(self.state, self.cache, tokens, span, hidden, mx.array([rows - 1]))
        self._untold = []

    def _run(self, step: Step, model: Target | Drafter, fixed: Hashable, *arrays: Any) -> Any:
        return self.pair.programs.run(step, model, self.cache, fixed, *arrays)

    def _context(self) -> Context:
        reach = self.chooser.rules.reach
        recent = self.text[max(0, self.length - reach) : self.length]
        return Context(self.seed, mx.array([[-1] * (reach - len(recent)) + recent], mx.int32))


def rounds(sequence: Sequence, depth: Depth, budget: int, copies: Copies | None = None) -> Iterator[Round]:
    """Rounds until `budget` tokens have been emitted. The caller stops earlier by not asking again.

    `copies` offers earlier text to be tried in place of the drafter's proposals.
    """
    number = 0
    while budget > 0:
        # Before its first round, a drafter that has not read the prompt has no hidden state to draft from.
        most = budget - 1 if sequence.ready or not sequence.pair.drafter.limit else 0
        copy = copies.propose(min(budget - 1, MAX_BLOCK - 1)) if copies else []
        choice = depth.choose(len(copy), most)
        timed = number >= WARM_UP and (number - WARM_UP) % SPLIT_EVERY == 0
        result = sequence.round(copy[: choice.drafts] if choice.copied else choice.drafts, timed)
        seconds = sequence.pair.agreed.seconds(result.times.total)
        depth.observe(Outcome(result.drafted, result.copied, result.accepted, result.likely, seconds))
        if copies:
            copies.extend(result.tokens)
            if result.copied:
                copies.observe(result.drafted, result.accepted)
        budget -= len(result.tokens)
        number += 1
        yield result
