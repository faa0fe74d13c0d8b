"""One text that is being decoded: its tokens and its rules. What the device holds of it lies in its batch."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mtp_mlx.batch import Batch, Round
from mtp_mlx.cache import Cache
from mtp_mlx.choosing import Callables, Choice, Rules
from mtp_mlx.errors import MTPError, RequestError
from mtp_mlx.types import Pair, State

if TYPE_CHECKING:
    from mtp_mlx.grammar import GrammarState

Progress = Callable[[int, int], None]  # prompt tokens read so far, all prompt tokens


class Sequence:
    """What a text says so far and how its tokens are chosen. The newest token is the only one no block has read yet."""

    def __init__(self, pair: Pair, chooser: Rules | Callables, seed: int = 0):
        self.chooser = chooser
        self.seed = seed
        self.text: list[int] = []  # -1 for a token of which only the cache knows
        self.grammar: GrammarState | None = None  # what the next text has to be; set before its first round
        cache = pair.make_cache()
        self.batch = Batch(pair, [self], cache, pair.drafter.start(cache))

    @property
    def length(self) -> int:
        """Tokens before the newest one, all of them read."""
        return len(self.text) - 1

    @property
    def bound(self) -> bool:
        """Whether a grammar decides which tokens may come."""
        return self.grammar is not None and not self.grammar.free

    @property
    def pair(self) -> Pair:
        return self.batch.pair

    @property
    def cache(self) -> Cache:
        return self._alone.cache

    @property
    def state(self) -> State:
        return self._alone.state

    @property
    def ready(self) -> bool:
        return self.batch.ready

    @property
    def nbytes(self) -> int:
        """Bytes of its part of the buffers, empty capacity included."""
        return self.batch.cache.nbytes // len(self.batch.sequences)

    @property
    def _alone(self) -> Batch:
        assert self.batch.sequences == [self], "what it holds lies beside others in a batch"
        return self.batch

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
        self._alone.commit()
        unread = self.text[-1:] + prompt
        self.text = self.text or prompt[:1]
        self.cache.reserve(self.length + len(unread))
        yield 0
        for begin in range(0, len(unread) - 1, step):
            chunk = unread[begin : min(begin + step, len(unread) - 1)]
            self._alone.read(chunk, unread[begin + 1 : begin + 1 + len(chunk)])
            yield begin + len(chunk)

    def round(self, drafts: int | list[int], split: bool = False) -> Round:
        """A round of a text that is alone, see `Batch.round`. Raises what went wrong."""
        assert self.text, "a prompt comes first"
        (result,) = self._alone.round(drafts if isinstance(drafts, int) else [drafts], split)
        if isinstance(result, Exception):
            raise result
        return result

    def keep(self, n: int) -> None:
        """Let the newest round have ended with its n-th token; those after it have never been written."""
        del self.text[len(self.text) - self.batch.keep(self, n) :]

    def commit(self) -> None:
        """Keep what is right of the newest round for good, and let the drafter know."""
        self.batch.commit()

    @property
    def committed(self) -> bool:
        """Whether nothing of the newest round can be cut any more."""
        return self.batch.committed

    def recent(self, reach: int) -> list[int]:
        """So many tokens before the newest one; -1 before the text begins."""
        known = self.text[max(0, self.length - reach) : self.length]
        return [-1] * (reach - len(known)) + known

    def take(self, choice: Choice | Exception) -> Choice | Exception:
        """Add to the text what was chosen for it, or say why nothing can be."""
        if isinstance(choice, Exception):
            return choice
        if not choice.sound:
            return self._unsound()
        if self.grammar is not None:
            try:
                self.grammar.advance(choice.tokens)
            except Exception as error:  # whatever it is, the other texts go on
                return error
        self.text += choice.tokens
        return choice

    def _unsound(self) -> MTPError:
        if self.bound:
            return RequestError(
                f"after {self.length} tokens the grammar leaves nothing that can be chosen; it may lead to a dead end, "
                "or a bias forbids what it asks for"
            )
        return MTPError(
            f"the model's logits after {self.length} tokens are not finite; the checkpoint or its "
            "quantisation is damaged, or a penalty or bias is out of all proportion"
        )
