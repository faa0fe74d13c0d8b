"""A round: draft -> verify -> accept -> commit -> advance, for one text or for many in one block.

Plain decoding is the same with nothing drafted, and one text alone is a batch of one. A round is built lazily and read
once by the host.
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import ref

import mlx.core as mx

from mtp_mlx import steps
from mtp_mlx.cache import MAX_BLOCK, Cache, taken
from mtp_mlx.choosing import Callables, Choice, Context, Group, Rules, read
from mtp_mlx.clock import Clock, Times
from mtp_mlx.programs import Step
from mtp_mlx.types import Drafter, Pair, Span, State, Target

if TYPE_CHECKING:
    from mtp_mlx.grammar import GrammarState
    from mtp_mlx.sequence import Sequence

# A write copies a buffer that something in flight still reads. So the target's writes wait for a draft that reads
# its buffers, unless those are so small, in bytes, that copying them takes less time than waiting.
COPIED = 2**24
UNTOLD = 256  # blocks after which a drafter is told of them even though it is not asked


class Round(NamedTuple):
    """What one round brought to one text."""

    tokens: list[int]  # the accepted drafts, then one token of the target's own
    drafted: int
    copied: bool  # the drafts were a copy of earlier text
    accepted: int
    likely: bool  # whether the first draft was the target's most probable token, whatever was drawn
    logprobs: mx.array  # (len(tokens) or more, V)
    times: Times  # of the round, which all texts of a batch share
    texts: int = 1  # how many these are

    def first(self, n: int) -> "Round":
        """The round as if it had ended with its n-th token: a stop inside an accepted run."""
        return self._replace(tokens=self.tokens[:n], accepted=min(self.accepted, n))


class _Block(NamedTuple):
    """Rows that the target has read and nobody has committed yet."""

    tokens: mx.array  # (B, L)
    hidden: mx.array  # (B, L, D)
    start: int | None  # where it stands, if it is a part of a prompt
    kept: tuple[int, ...]  # how many of the rows of each text are to be committed


class _Proposal(NamedTuple):
    """Drafts for every text of a batch."""

    tokens: mx.array  # (B, k)
    laws: list[list[mx.array]]  # for each group what its own were drawn from, if they were drawn by chance


class Batch:
    """Texts that are read in one block each round: row b of every array belongs to text b.

    It holds what is on the device: the target's cache and the drafter's state. The rows of the newest block are
    committed when the next one is begun; until then `keep` can still cut it shorter, for every text apart.
    """

    def __init__(self, pair: Pair, sequences: "list[Sequence]", cache: Cache, state: State):
        self.pair = pair
        self._members = [ref(sequence) for sequence in sequences]  # they hold the batch, and buffers go with them
        self.cache = cache
        self.state = state
        self.ready = False  # whether the drafter has been told of the token before the newest one
        self.rounds = 0
        self._block: _Block | None = None
        self._untold: list[tuple[mx.array, mx.array]] = []  # tokens and hiddens that the drafter has yet to learn of

    @property
    def sequences(self) -> "list[Sequence]":
        """The texts, in the order of their rows. Whoever began one has to keep it or have it leave."""
        alive = [member() for member in self._members]
        assert None not in alive, "a text has been dropped in the middle of a batch"
        return cast("list[Sequence]", alive)

    def join(self, other: "Batch") -> None:
        """Take in the texts of another batch, which is used up. The drafter has been told of both, see `ready`."""
        assert self.ready and other.ready, "a drafter that has not been told of a text cannot draft for it"
        self.commit()
        other.commit()
        self.cache.join(other.cache)
        self.state = tuple(mx.concatenate([ours, theirs]) for ours, theirs in zip(self.state, other.state, strict=True))
        joining = other.sequences
        self._members += other._members
        for sequence in joining:
            sequence.batch = self

    def release(self, leaving: "list[Sequence]") -> None:
        """Let texts go on by themselves, each in a batch of its own; the others stay."""
        if len(self._members) == 1 or not leaving:
            return
        self.commit()
        apart = [sequence for sequence in self.sequences if sequence in leaving]
        for sequence in apart:
            sequence.batch = self._of([sequence])
        staying = [sequence for sequence in self.sequences if sequence not in leaving]
        if staying:
            rows = self._rows(staying)
            self.cache.reduce(rows)
            self._members, self.state = [ref(sequence) for sequence in staying], tuple(taken(list(self.state), rows))
            mx.eval(self.state)

    def _of(self, sequences: "list[Sequence]") -> "Batch":
        rows = self._rows(sequences)
        state = tuple(taken(list(self.state), rows))
        batch = Batch(self.pair, sequences, self.cache.select(rows), state)
        batch.ready = self.ready
        mx.eval(state)
        return batch

    def _rows(self, sequences: "list[Sequence]") -> list[int]:
        return [self.sequences.index(sequence) for sequence in sequences]

    def read(self, chunk: list[int], following: list[int]) -> None:
        """Read a chunk of a prompt, which begins with the newest token of the only text, and keep it.

        `following` is the same, one token ahead.
        """
        (sequence,) = self.sequences
        start, tokens = sequence.length, mx.array(chunk, mx.int32)[None]  # (1, L)
        output = self.pair.target(tokens, self.cache, Span(start, len(chunk)))
        self.ready = self.pair.drafter.reads_prompt
        self._block = _Block(tokens, output.hidden, start, (len(chunk),))
        sequence.text = sequence.text + following  # here, so that reading can be broken off
        self.commit()
        mx.eval(self.cache.arrays(), self.state)
        mx.clear_cache()

    def round(self, drafts: int | list[list[int]], split: bool = False) -> list[Round | Exception]:
        """Let the drafter propose so many tokens for every text, or propose these, and verify them.

        What came of it for each text: an error is its own, and the others go on. `split` waits in between, so that
        the phases can be timed.
        """
        clock = Clock(split)
        self.rounds += 1
        copied = not isinstance(drafts, int)
        self.commit(tell=drafts != 0 and not copied)
        clock.wait(self.cache.arrays(), self.state)

        groups = self._groups()
        proposal = self._propose(drafts, groups)
        clock.wait(proposal, needed=self.pair.drafter.reads(self.cache) > COPIED and proposal.tokens.size > 0)

        newest = mx.array([sequence.text[-1:] for sequence in self.sequences], mx.int32)
        block = mx.concatenate([newest, proposal.tokens], axis=1)  # (B, k+1)
        hidden, choices = self._verify(block, proposal, groups, clock)

        taken = [sequence.take(choice) for sequence, choice in zip(self.sequences, choices, strict=True)]
        kept = tuple(0 if isinstance(choice, Exception) else len(choice.tokens) for choice in taken)
        if any(kept):
            self._block, self.ready = _Block(block, hidden, None, kept), True
        k, texts, times = proposal.tokens.shape[1], len(taken), clock.times()
        return [
            choice
            if isinstance(choice, Exception)
            else Round(choice.tokens, k, copied, len(choice.tokens) - 1, choice.likely, choice.logprobs, times, texts)
            for choice in taken
        ]

    def keep(self, sequence: "Sequence", n: int) -> int:
        """Let the newest round of a text have ended with its n-th token; how many tokens have never been written."""
        row, block = self.sequences.index(sequence), self._block
        assert block is not None and 0 < n <= block.kept[row], f"the newest round has no token {n}"
        self._block = block._replace(kept=(*block.kept[:row], n, *block.kept[row + 1 :]))
        return block.kept[row] - n

    @property
    def committed(self) -> bool:
        """Whether there is no block that `keep` could cut."""
        return self._block is None

    def _groups(self) -> tuple[Group, ...]:
        """The texts by their rules. One that the host has a say in is not chosen for together with others."""
        rows: dict[Hashable, list[int]] = {}
        for row, sequence in enumerate(self.sequences):
            apart = row if isinstance(sequence.chooser, Callables) else -1 if sequence.bound else -2
            rows.setdefault((sequence.chooser.rules, apart), []).append(row)
        return tuple(Group(cast(tuple[Rules, int], key)[0], tuple(own)) for key, own in rows.items())

    def _propose(self, drafts: int | list[list[int]], groups: tuple[Group, ...]) -> _Proposal:
        k = drafts if isinstance(drafts, int) else len(drafts[0])
        self.cache.reserve(max(sequence.length for sequence in self.sequences) + k + 1)
        none: list[list[mx.array]] = [[] for _ in groups]
        if not isinstance(drafts, int):
            return _Proposal(mx.array(drafts, mx.int32), none)
        if k == 0:
            return _Proposal(mx.zeros((len(self.sequences), 0), mx.int32), none)
        assert self.ready, "a drafter that has not been told of the text has nothing to draft from"
        last = mx.array([sequence.text[-1] for sequence in self.sequences], mx.int32)
        fixed = (k, groups, self.pair.target.vocabulary)
        arrays = (self.state, last, self._contexts(groups))
        tokens, laws = self._run(steps.propose, self.pair.drafter, fixed, *arrays)
        return _Proposal(self.pair.agreed.tokens(tokens), laws)

    def _verify(
        self, block: mx.array, proposal: _Proposal, groups: tuple[Group, ...], clock: Clock
    ) -> tuple[mx.array, list[Choice | Exception]]:
        """The hidden of every row, (B, k+1, D), and the target's choices; this is where the host waits and reads."""
        if any(isinstance(sequence.chooser, Callables) or sequence.bound for sequence in self.sequences):
            return self._verify_apart(block, proposal, groups, clock)
        arrays = (block, proposal.laws, self._contexts(groups))
        choices, hidden = self._run(steps.judge, self.pair.target, groups, *arrays)
        reports = [self._agreed(*choice) for choice in choices]
        clock.evaluate(reports, hidden, self.cache.arrays(), self.state)
        return hidden, self._placed(groups, [list(read(*report)) for report in reports])

    def _verify_apart(
        self, block: mx.array, proposal: _Proposal, groups: tuple[Group, ...], clock: Clock
    ) -> tuple[mx.array, list[Choice | Exception]]:
        """The same where the host has a say in a choice: it looks at the drafts while the target reads them."""
        mx.async_eval(proposal.tokens)  # by itself, or its end would be the target's
        logits, hidden = self._run(steps.forward, self.pair.target, None, block)
        held = hidden, self.cache.arrays(), self.state
        masks = self._masks(proposal.tokens, (logits, held), clock)
        contexts = self._contexts(groups)
        decided: dict[int, Any] = {}  # group -> its report and log-probabilities
        for i, group in enumerate(groups):
            if not isinstance(self.sequences[group.rows[0]].chooser, Callables):
                arrays = (logits, block, proposal.laws[i], contexts[i], _stacked(group, masks))
                decided[i] = self._agreed(*self._run(steps.decide, self.pair.target, group, *arrays))
        clock.evaluate(list(decided.values()), logits, block, held)
        choices: list[list[Choice | Exception]] = [
            list(read(*decided[i])) if i in decided else [self._asked(group.rows[0], block, logits, masks)]
            for i, group in enumerate(groups)
        ]
        placed = self._placed(groups, choices)
        return hidden, [
            mask if isinstance(mask := masks.get(row), Exception) else choice for row, choice in enumerate(placed)
        ]

    def _agreed(self, report: mx.array, logprobs: mx.array) -> tuple[mx.array, mx.array]:
        """What a group's choice is on all machines that run the pair."""
        return self.pair.agreed.tokens(report), logprobs

    def _asked(self, row: int, block: mx.array, logits: mx.array, masks: "_Masks") -> Choice | Exception:
        """What callables choose for a text."""
        sequence, mask = self.sequences[row], masks.get(row)
        assert isinstance(sequence.chooser, Callables)
        if isinstance(mask, Exception):
            return mask
        drafted = cast(list[int], block[row, 1:].tolist())
        seed = mx.array([sequence.seed], mx.uint32)
        try:
            return sequence.chooser.choose(seed, sequence.text, drafted, logits[row], mask, self.pair.agreed)
        except Exception as error:  # whoever wrote them, the other texts go on
            return error

    def _placed(self, groups: tuple[Group, ...], choices: list[list[Choice | Exception]]) -> list[Choice | Exception]:
        """What was chosen for the rows of each group, in the order of the texts."""
        placed = {
            row: one
            for group, own in zip(groups, choices, strict=True)
            for row, one in zip(group.rows, own, strict=True)
        }
        return [placed[row] for row in range(len(self.sequences))]

    def _masks(self, drafts: mx.array, pending: Any, clock: Clock) -> "_Masks":
        """What grammars allow at every row of the texts that have one, while the device works on `pending`."""
        bound = [(row, sequence.grammar) for row, sequence in enumerate(self.sequences) if sequence.bound]
        if not bound:
            return {}
        mx.async_eval(pending)
        clock.pause(drafts)
        drafted = cast(list[list[int]], drafts.tolist())
        return {row: _mask(grammar, drafted[row]) for row, grammar in bound if grammar is not None}

    def commit(self, tell: bool = True) -> None:
        """Keep what is right of the newest block, in the target's cache and in the drafter's state.

        A drafter that is not asked next is told later, of many rows at once: plain decoding must not pay for it.
        """
        if self._block is not None:
            tokens, hidden, start, kept = self._block
            even = len(set(kept)) == 1  # of rows that are kept unevenly it is told at once
            later = self.ready and even and bool(self._untold or not tell)
            if not even:
                self._catch_up()
            fixed = (set(kept) == {tokens.shape[1]}, self.ready and not later, start)
            arrays = (self.state, tokens, hidden, mx.array(kept, mx.int32))
            if start is None:
                state = self._run(steps.keep, self.pair.drafter, fixed, *arrays)
            else:  # a prompt is read once, nothing of it would ever be replayed
                state = steps.keep(self.pair.drafter, self.cache, fixed, *arrays)
            self.state, self._block = tuple(state), None
            if later and self.pair.drafter.limit:
                self._untold.append((tokens[:, : kept[0]], hidden[:, : kept[0]]))
        if self._untold and (tell or len(self._untold) >= UNTOLD):
            self._catch_up()

    def _catch_up(self) -> None:
        """Tell the drafter of the rows that it has not been told of, the last that have been committed."""
        if not self._untold:
            return
        tokens = mx.concatenate([tokens for tokens, _ in self._untold], axis=1)
        hidden = mx.concatenate([hidden for _, hidden in self._untold], axis=1)
        rows, texts = tokens.shape[1], len(self.sequences)
        # Where a text stands the host knows if there is one. Several are told as in a round, of a block at a time.
        first = self.sequences[0].length - rows if texts == 1 else self.cache.position - rows
        step = rows if texts == 1 else MAX_BLOCK
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            last = mx.array([end - begin - 1] * texts)
            told = tokens[:, begin:end], Span(first + begin, end - begin), hidden[:, begin:end], last
            self.state = self.pair.drafter.advance(self.state, self.cache, *told)
        self._untold = []

    def _run(self, step: Step, model: Target | Drafter, fixed: Hashable, *arrays: Any) -> Any:
        return self.pair.programs.run(step, model, self.cache, fixed, *arrays)

    def _contexts(self, groups: tuple[Group, ...]) -> list[Context]:
        return [self._context(group) for group in groups]

    def _context(self, group: Group) -> Context:
        own = [self.sequences[row] for row in group.rows]
        seeds = mx.array([sequence.seed for sequence in own], mx.uint32)
        return Context(seeds, mx.array([sequence.recent(group.rules.reach) for sequence in own], mx.int32))


_Masks = dict[int, mx.array | Exception | None]  # by row (k+1, V / 32 or more) uint32, or why nothing can follow


def _mask(grammar: "GrammarState", drafts: list[int]) -> mx.array | Exception | None:
    """Which tokens a grammar allows after each draft; None: all."""
    try:
        mask = grammar.masks(drafts)
    except Exception as error:  # whatever it is, the other texts go on
        return error
    return None if mask is None else mask[0]


def _stacked(group: Group, masks: _Masks) -> list[mx.array]:
    """The masks of a group, (G, k+1, V / 32 or more); empty where all tokens are allowed."""
    own = [masks.get(row) for row in group.rows]
    known = next((mask for mask in own if isinstance(mask, mx.array)), None)
    if known is None:
        return []
    free = mx.full(known.shape, 2**32 - 1, mx.uint32)
    return [mx.stack([mask if isinstance(mask, mx.array) else free for mask in own])]
