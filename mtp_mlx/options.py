"""How a text is to be written: what `generate`, `chat`, the engine and the server hand on as one value."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.choosing import Drafts
from mtp_mlx.grammar import Grammar
from mtp_mlx.penalties import Penalties
from mtp_mlx.sampling import Sampler

Prompt = str | list[int] | mx.array

DEFAULT_MAX_TOKENS = 256
DEFAULT_PREFILL_STEP = 2048


@dataclass(frozen=True)
class Options:
    """What `mtp_mlx.stream_generate` can be told, under the same names, and what only a server asks for."""

    max_tokens: int = DEFAULT_MAX_TOKENS  # -1: as many as the context holds
    depth: int | str = "auto"
    sampler: Sampler | Callable[[mx.array], mx.array] | None = None
    penalties: Penalties | None = None
    logits_processors: Iterable[Callable[[mx.array, mx.array], mx.array]] | None = None
    seed: int | None = None
    drafts: Drafts | None = None
    lookup: bool = True
    prediction: Prompt | None = None
    prefill_step_size: int = DEFAULT_PREFILL_STEP
    stops: frozenset[int] = frozenset()  # tokens that end the text besides the tokenizer's own
    grammar: Grammar | None = None  # what the answer has to be
    thinking: bool = False  # whether the prompt ends within reasoning, whose end the grammar awaits
    frees: frozenset[int] = frozenset()  # tokens that an answer may begin with instead, behind which anything goes
