"""Replies to feed to the parser: small tokenizers, streams cut anywhere, calls written as the templates write them."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mtp_mlx.dialects import Dialect, find_dialect
from mtp_mlx.speech import Content, Event, Parser, Reason, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from mtp_mlx.tool_calls import Tools

GEMMA_MARKERS = ["<|tool_call>", "<tool_call|>", "<|tool_response>", "<|channel>", "<channel|>", '<|"|>']
QWEN_MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@cache
def tokenizer(*markers: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges and these markers."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(["<function=weather>\n<parameter=city>\nthink the tool call thought"] * 3, trainer)
    made.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in markers])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def dialect(*markers: str) -> Dialect:
    return find_dialect(tokenizer(*markers).get_vocab())


GEMMA = dialect(*GEMMA_MARKERS)
QWEN = dialect(*QWEN_MARKERS)

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: Tools = {"weather": CITY, "time": {}}

Piece = tuple[int, str]
TEXT = 10**6  # an id that no marker has


@dataclass
class Said:
    """What came out of a parser, put together."""

    content: str = ""
    reasoning: str = ""
    names: list[str] = field(default_factory=list)
    fragments: list[str] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    finish_reason: str = ""
    events: list[Event] = field(default_factory=list)

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """The calls that came out whole."""
        return [(self.names[i], json.loads(self.fragments[i])) for i in self.ended]

    def add(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case Content(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case ToolCallStart(index, _, name):
                assert index == len(self.names)
                self.names.append(name)
                self.fragments.append("")
            case ToolCallArguments(index, fragment):
                assert index == len(self.names) - 1
                self.fragments[index] += fragment
            case ToolCallEnd(index):
                assert index == len(self.names) - 1
                self.ended.append(index)


def pieces(dialect: Dialect, text: str) -> list[Piece]:
    """A text in which every spelled marker is the marker's token and all else is one token."""
    ids = {marker.text: marker.id for marker in dialect.markers if marker.id is not None}
    parts = re.split("(" + "|".join(map(re.escape, ids)) + ")", text) if ids else [text]
    return [(ids.get(part) or TEXT, part) for part in parts if part]


def cut(stream: Iterable[Piece], size: int) -> list[Piece]:
    """The stream with its texts cut into pieces of a size."""
    return [
        (token, text[i : i + (size if token == TEXT else len(text))])
        for token, text in stream
        for i in range(0, len(text), size if token == TEXT else len(text))
    ]


def say(
    dialect: Dialect,
    stream: str | Iterable[Piece],
    tools: Tools = TOOLS,
    thinking: bool = False,
    reason: Reason = "stop",
) -> Said:
    """What a parser makes of a reply."""
    parser = Parser(dialect, tools=tools, starts_thinking=thinking, new_id=lambda: "call")
    said = Said()
    for token, text in pieces(dialect, stream) if isinstance(stream, str) else stream:
        for event in parser.feed(token, text):
            said.add(event)
    for event in parser.finish(reason):
        said.add(event)
    said.finish_reason = parser.finish_reason(reason)
    return said


def detokenized(markers: list[str], text: str) -> list[Piece]:
    """A text as a tokenizer's tokens and mlx-lm's detokenizer give it."""
    small = tokenizer(*markers)
    detokenizer = BPEStreamingDetokenizer(small)
    stream = []
    for token in small.encode(text):
        detokenizer.add_token(token)
        stream.append((token, detokenizer.last_segment))
    detokenizer.finalize()
    return [*stream, (TEXT, detokenizer.last_segment)]


def gemma_value(value: object) -> list[Piece]:
    """A value as Gemma 4's template writes it: text between quotes and unescaped, members sorted, keys bare."""
    quote = next(marker for marker in GEMMA.markers if marker.text == '<|"|>')
    assert quote.id is not None
    if isinstance(value, str):
        return [(quote.id, quote.text), (TEXT, value), (quote.id, quote.text)]
    if isinstance(value, Mapping):
        return [(TEXT, "{"), *_joined([[(TEXT, f"{key}:"), *gemma_value(value[key])] for key in sorted(value)], "}")]
    if isinstance(value, list):
        return [(TEXT, "["), *_joined([gemma_value(item) for item in value], "]")]
    return [(TEXT, "None" if value is None else json.dumps(value))]  # some releases write null


def _joined(parts: list[list[Piece]], end: str) -> list[Piece]:
    joined: list[Piece] = []
    for i, part in enumerate(parts):
        joined += [(TEXT, ","), *part] if i else part
    return [*joined, (TEXT, end)]


def gemma_call(name: str, arguments: Mapping[str, object]) -> list[Piece]:
    ((start, _),) = pieces(GEMMA, "<|tool_call>")
    ((end, _),) = pieces(GEMMA, "<tool_call|>")
    return [(start, "<|tool_call>"), (TEXT, f"call:{name}"), *gemma_value(arguments), (end, "<tool_call|>")]


def qwen_call(name: str, arguments: Mapping[str, object]) -> list[Piece]:
    """A call as Qwen 3.5's template writes it: structures as JSON, all else as Python writes it."""
    text = f"\n<function={name}>\n"
    for key, value in arguments.items():
        written = json.dumps(value) if isinstance(value, list | dict) else str(value)
        text += f"<parameter={key}>\n{written}\n</parameter>\n"
    ((start, _),) = pieces(QWEN, "<tool_call>")
    ((end, _),) = pieces(QWEN, "</tool_call>")
    return [(start, "<tool_call>"), (TEXT, text + "</function>\n"), (end, "</tool_call>")]
