"""What a server serves: one loaded pair, and everything that requests are read and answered with."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.conversation import Conversations
from mtp_mlx.dialects import Dialect, find_dialect
from mtp_mlx.engine import Engine
from mtp_mlx.errors import RequestError
from mtp_mlx.grammar import Grammar, Guide
from mtp_mlx.infill import Infill, find_infill
from mtp_mlx.loading import Loaded
from mtp_mlx.server.refusal import RefusedError


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing."""

    max_tokens: int = -1  # as many as the context holds
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    depth: int | str = "auto"
    thinking: bool | None = None  # None: as the template does by itself


@dataclass(frozen=True)
class Service:
    """One pair and its engine, under the names that clients may call it by."""

    engine: Engine
    tokenizer: TokenizerWrapper
    conversations: Conversations
    dialect: Dialect
    make_guide: Callable[[], Guide]  # raises RequestError where no grammar can be followed
    infill: Infill | None
    names: tuple[str, ...]  # the first is its own
    vocabulary: int
    context: int  # tokens of a prompt and its answer
    trained_context: int
    slots: int  # requests that are worked on at a time
    defaults: Defaults = field(default_factory=Defaults)
    facts: Mapping[str, Any] = field(default_factory=dict)  # for /props and the model list

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        engine: Engine,
        *,
        slots: int,
        names: tuple[str, ...] = (),
        context: int | None = None,
        defaults: Defaults | None = None,
    ) -> "Service":
        """A loaded pair, run by its engine."""
        tokenizer, target = loaded.tokenizer, loaded.pair.target
        vocabulary: Mapping[str, int] = tokenizer.get_vocab()
        dialect = find_dialect(vocabulary)
        stops = frozenset(tokenizer.eos_token_ids) | dialect.stops
        return cls(
            engine=engine,
            tokenizer=tokenizer,
            conversations=Conversations(tokenizer, dialect),
            dialect=dialect,
            make_guide=cache(lambda: Guide.of(tokenizer, target.vocabulary, stops, dialect)),
            infill=find_infill(vocabulary),
            names=(*names, loaded.target),
            vocabulary=target.vocabulary,
            context=min(context or target.context, target.context),
            trained_context=target.context,
            slots=slots,
            defaults=defaults or Defaults(),
            facts={
                "drafter": loaded.drafter and _last_part(loaded.drafter),
                "drafter_reason": loaded.drafter_reason,
                "adapter": loaded.adapter and _last_part(loaded.adapter),
                "weights_bytes": target.nbytes + loaded.pair.drafter.nbytes,
            },
        )

    @property
    def guide(self) -> Guide:
        """What grammars have to know. Raises RequestError for a tokenizer that cannot be taken apart."""
        return self.make_guide()

    def prepare(self) -> None:
        """Take the tokenizer apart, which takes seconds, before a grammar is asked for."""
        with suppress(RequestError):  # whoever asks for a grammar is told
            Grammar.json_object(self.guide)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def fingerprint(self) -> str:
        """Changes with what a seeded text depends on."""
        told = repr((self.names, self.vocabulary, self.trained_context, sorted(self.facts.items())))
        return f"fp_{hashlib.sha256(told.encode()).hexdigest()[:10]}"

    def check_name(self, given: str | None) -> None:
        """Raises RefusedError for a model that is not the one served; nothing is ever loaded for a request."""
        known = {*self.names, *map(_last_part, self.names)}
        if given is not None and given not in known:
            raise RefusedError(
                404,
                f"the model {given[:80]!r} is not served here; ask for {self.name!r}, or leave model out",
                param="model",
                code="model_not_found",
            )


def _last_part(name: str) -> str:
    """The name alone, of a folder or a hub id: clients need not know where this machine keeps its files."""
    return name.rstrip("/").rpartition("/")[2]
