"""Structured output: which tokens a grammar allows at every row of a block. All of it happens on the host.

`Guide` is what grammars know of a tokenizer, `Grammar` one that is compiled, `GrammarState` where a text stands in it.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.call_grammar import call_grammar
from mtp_mlx.dialects import Dialect
from mtp_mlx.errors import RequestError
from mtp_mlx.keywords import check_keywords
from mtp_mlx.marks import Mark
from mtp_mlx.tool_calls import Tools

LARGEST = 2**18  # characters of a grammar or schema
COMPILED = 64  # grammars that a guide keeps
WORD = 32  # bits of a mask's word

# White space between JSON tokens, once at each place: without a bound a model may write line breaks for ever.
_WHITE_SPACE = r" |\n( {0,32}|\t{0,8})"
# llguidance's own defaults but for the lexer's states, of which each takes a kilobyte or two.
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_BREAKS = ("\n", "\n\n")  # what a template writes between reasoning and answer

Masks = np.ndarray[tuple[int, int], np.dtype[np.uint32]]


class _Compiled:
    """The latest grammars of a guide."""

    def __init__(self) -> None:
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, grammar: str, build: Callable[[], LLMatcher]) -> LLMatcher:
        # One at a time: two requests with the same new grammar, or the first two of a model, shall not both build.
        with self._lock:
            matcher = self._matchers.pop(grammar, None) or build()
            self._matchers[grammar] = matcher
            if len(self._matchers) > COMPILED:
                self._matchers.popitem(last=False)
            return matcher


@dataclass(frozen=True, eq=False)
class Guide:
    """What grammars know of a model: made once, shared by all of them and by all threads.

    The tokenizer is taken apart when the first grammar is compiled, which takes seconds for a large vocabulary.
    """

    backend: Any  # a `tokenizers.Tokenizer`
    vocabulary: int  # rows of the model's logits, of which a tokenizer may leave some unused
    stops: frozenset[int]
    dialect: Dialect
    _compiled: _Compiled = field(default_factory=_Compiled, repr=False)

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper, vocabulary: int, stops: frozenset[int], dialect: Dialect) -> "Guide":
        """Raises RequestError for a tokenizer that cannot be taken apart, or a model without an end of text."""
        if not stops:
            raise RequestError("the model has no token that ends a text; structured output needs one")
        try:
            backend = tokenizer.backend_tokenizer
        except AttributeError:
            raise RequestError("structured output needs a tokenizer.json; the model's tokenizer has none") from None
        return cls(backend, vocabulary, stops, dialect)

    def marker(self, mark: Mark) -> int | None:
        """The token of a marker, where it is one."""
        return next((marker.id for marker in self.dialect.markers if marker.mark is mark), None)

    @cached_property
    def breaks(self) -> frozenset[int]:
        """Tokens that are one line break or two."""
        ids = (self.backend.encode(text, add_special_tokens=False).ids for text in _BREAKS)
        return frozenset(found[0] for found in ids if len(found) == 1)

    @cached_property
    def words(self) -> int:
        """32-bit words of a mask."""
        return -(-self._tokens.vocab_size // WORD)

    def bits(self, tokens: Iterable[int]) -> Masks:
        """A mask of these tokens, (1, words)."""
        row: Masks = np.zeros((1, self.words), np.uint32)
        for token in tokens:
            row[0, token // WORD] |= np.uint32(1 << token % WORD)
        return row

    @cached_property
    def stop_bits(self) -> Masks:
        return self.bits(self.stops)

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of a grammar in llguidance's form; it is only to be copied.

        Raises RequestError for a grammar that is wrong or beyond the limits.
        """
        return self._compiled.get(grammar, lambda: self._compile(grammar))

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask of a lexer is its dearest
        problems = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if problems:
            raise RequestError(f"this grammar cannot be enforced: {_one_line(problems[0])}")
        return matcher

    @cached_property
    def _tokens(self) -> LLTokenizer:
        backend = copy(self.backend)
        backend.no_padding()
        backend.no_truncation()
        size = max(self.vocabulary, backend.get_vocab_size())
        tokens = LLTokenizer(backend.to_str(), n_vocab=size, eos_token=sorted(self.stops))
        for marker in self.dialect.markers:
            if marker.id is not None and not tokens.is_special_token(marker.id):
                raise RequestError(f"the tokenizer takes the marker {marker.text} for ordinary text")
        return tokens


@dataclass(frozen=True, eq=False)
class Grammar:
    """What a text has to be, compiled for a tokenizer. Shared between texts and threads.

    All constructors raise RequestError for what is wrong, too large, or would not be enforced in full.
    """

    guide: Guide
    _matcher: LLMatcher = field(repr=False)

    @classmethod
    def json_object(cls, guide: Guide) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema(guide, {"type": "object"})

    @classmethod
    def json_schema(cls, guide: Guide, schema: Mapping[str, Any]) -> "Grammar":
        """JSON by a schema; members come in the order in which the schema has them, white space is bounded."""
        if not isinstance(schema, Mapping):
            raise RequestError(f"the JSON schema is {schema!r}; give an object")
        check_keywords(schema)
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema is not JSON: {_one_line(str(error))}") from None
        _check_size(text, "JSON schema")
        return cls._of(guide, LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITE_SPACE}))

    @classmethod
    def regex(cls, guide: Guide, pattern: str) -> "Grammar":
        """Text that a regular expression of the Rust kind matches as a whole."""
        _check_size(pattern, "regular expression")
        return cls._of(guide, LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def choice(cls, guide: Guide, texts: Collection[str]) -> "Grammar":
        """One of these texts."""
        if not texts or not all(texts):
            raise RequestError("a choice needs texts to choose from, none of them empty")
        return cls.lark(guide, "start: " + " | ".join(map(json.dumps, texts)))

    @classmethod
    def lark(cls, guide: Guide, text: str) -> "Grammar":
        """A grammar in llguidance's variant of Lark's syntax, whose rule is `start`."""
        _check_size(text, "grammar")
        return cls._of(guide, LLMatcher.grammar_from_lark(text))

    @classmethod
    def tool_calls(cls, guide: Guide, dialect: Dialect, tools: Tools) -> "Grammar":
        """One call or more of these tools (name -> JSON schema of its arguments), as the model writes calls."""
        return cls.lark(guide, call_grammar(dialect, tools))

    @classmethod
    def _of(cls, guide: Guide, grammar: str) -> "Grammar":
        return cls(guide, guide.compile(grammar))

    def start(
        self, *, thinking: bool = False, may_think: bool = True, frees: frozenset[int] = frozenset()
    ) -> "GrammarState":
        """The state of a text that begins.

        `thinking` says that the prompt ended within a block of reasoning, `may_think` that the reply may begin one
        itself; the grammar is for the answer behind it. After one of `frees`, which an answer may begin with instead,
        anything goes. Raises RequestError for reasoning whose end is not a token of the model's.
        """
        opening, closing = (self.guide.marker(mark) for mark in (Mark.THINK_OPEN, Mark.THINK_CLOSE))
        if thinking and closing is None:
            raise RequestError("the end of reasoning is no token of this model's; structured output cannot await it")
        opens = frozenset() if opening is None or closing is None or not may_think else frozenset([opening])
        return GrammarState(self.guide, self._matcher, _Phase.THINKING if thinking else _Phase.OPENING, opens, frees)


class _Phase(Enum):
    """Where a text stands."""

    THINKING = auto()  # no mask until reasoning ends
    OPENING = auto()  # at the first token of a reply that has not reasoned
    RESUMING = auto()  # behind reasoning
    LEADING = auto()  # behind the line breaks that follow it
    ANSWERING = auto()  # within the grammar
    FREE = auto()  # no mask any more


class GrammarState:
    """Where one text stands in its grammar. A sequence asks it before it chooses, and tells it what was chosen."""

    def __init__(self, guide: Guide, beginning: LLMatcher, phase: _Phase, opens: frozenset[int], frees: frozenset[int]):
        self._guide = guide
        self._beginning = beginning
        self._matcher = beginning.deep_copy()
        self._phase = phase
        self._opens = opens
        self._frees = frees
        self._text: list[int] = []  # what the matcher has consumed
        self._extras = {
            _Phase.OPENING: guide.bits(opens | frees),
            _Phase.RESUMING: guide.bits(guide.breaks | frees),
            _Phase.LEADING: guide.bits(frees),
        }

    @property
    def free(self) -> bool:
        """Whether nothing is forbidden any more, whatever comes."""
        return self._phase is _Phase.FREE

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._phase in (_Phase.THINKING, _Phase.FREE) or self._matcher.is_accepting()

    def masks(self, drafts: list[int]) -> mx.array | None:
        """Which tokens may stand after the text and each of the drafts, (1, k+1, words) uint32; None: all of them.

        A row behind a draft that is forbidden is never looked at and has no mask. Raises RequestError where nothing
        may follow the text.
        """
        rows: Masks = np.full((len(drafts) + 1, self._guide.words), 2**WORD - 1, np.uint32)
        phase, consumed = self._phase, len(self._text)
        bound = self._fill(rows[:1])
        if not rows[0].any():
            raise RequestError(f"nothing can follow here by the grammar{self._why()}")
        for j, draft in enumerate(drafts):
            if not rows[j, draft // WORD] >> np.uint32(draft % WORD) & 1:
                break
            self._take(draft)
            bound |= self._fill(rows[j + 1 : j + 2])
        self._return(phase, consumed)
        return mx.array(rows)[None] if bound else None

    def advance(self, tokens: list[int]) -> None:
        """The text goes on with these tokens, each of which its mask allowed."""
        for token in tokens:
            self._take(token)

    def _fill(self, row: Masks) -> bool:
        """Write the mask of the next token; whether there is one."""
        if self._phase in (_Phase.THINKING, _Phase.FREE):
            return False
        fill_next_token_bitmask(self._matcher, row.view(np.int32))
        row &= ~self._guide.stop_bits
        if self._matcher.is_accepting():
            row |= self._guide.stop_bits
        if self._phase in self._extras:
            row |= self._extras[self._phase]
        return True

    def _take(self, token: int) -> None:
        stop, opening = token in self._guide.stops, self._phase in self._extras
        if self._phase is _Phase.FREE or stop or (opening and token in self._frees):
            self._phase = _Phase.FREE  # behind a stop there is no text
        elif self._phase is _Phase.THINKING:
            if token == self._guide.marker(Mark.THINK_CLOSE):
                self._phase = _Phase.RESUMING
        elif self._phase is _Phase.OPENING and token in self._opens:
            self._phase = _Phase.THINKING
        elif self._matcher.validate_tokens([token]) == 1:
            self._consume(token)
        else:
            assert self._phase is _Phase.RESUMING and token in self._guide.breaks, f"token {token} was forbidden"
            self._phase = _Phase.LEADING

    def _consume(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._text.append(token)
        self._phase = _Phase.ANSWERING

    def _return(self, phase: _Phase, consumed: int) -> None:
        """Go back to an earlier point of the text."""
        if self._matcher.is_error():  # a draft led beyond the limits, which the text need not do
            self._matcher = self._beginning.deep_copy()
            self._matcher.consume_tokens(self._text[:consumed])
        elif len(self._text) > consumed:
            self._matcher.rollback(len(self._text) - consumed)
        del self._text[consumed:]
        self._phase = phase

    def _why(self) -> str:
        return f": {_one_line(self._matcher.get_error())}" if self._matcher.is_error() else ""


def _check_size(text: str, what: str) -> None:
    if not isinstance(text, str) or not text:
        raise RequestError(f"the {what} is {text!r}; give text")
    if len(text) > LARGEST:
        raise RequestError(f"the {what} has {len(text)} characters; the most is {LARGEST}")


def _one_line(message: str) -> str:
    return " ".join(message.split())[:400]
