"""What a checkpoint is and what it would take here, told from its config and its headers: no weight is read.

The networks are built as for loading, with the same checks of names and shapes, but nothing in them is computed. A
repository on the hub is read in parts, a few hundred kilobytes of it.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download

from mtp_mlx import memory
from mtp_mlx.checkpoint import text_part
from mtp_mlx.errors import CheckpointError, MTPError, RequestError
from mtp_mlx.forecast import ACCEPTANCE, DEEPEST, OVERLAP, Estimate, chips, estimate, this_chip
from mtp_mlx.hollow import hollow
from mtp_mlx.hub import DEMOS, find, is_hub_id
from mtp_mlx.loading import Paired, is_target, sketch, sketch_drafter
from mtp_mlx.memory import Network, Recurrence, Rows, Weights
from mtp_mlx.pairs import choose
from mtp_mlx.sketch import Sketch, precision

CONTEXTS = (4096, 32768, 131072)


class Context(NamedTuple):
    """What a text of so many tokens takes, and what one more token of it reads."""

    tokens: int
    cache: int  # bytes held for the target, and for a drafter that keeps rows of its own
    total: int  # with the weights of both
    fits: bool  # in the memory that MLX may use here
    plain_read: int  # bytes that a token of plain decoding reads
    draft_read: int | None  # bytes that a draft step reads


@dataclass(frozen=True)
class Outline:
    """A checkpoint at a glance."""

    name: str
    source: str  # where its figures come from
    role: str  # "target" or "drafter"
    model_type: str
    layers: Mapping[str, int]  # kind -> layers
    kept: int  # layers that keep keys and values or a state
    context: int | None  # tokens that it was made for
    precision: str
    quantization: str
    weights: Weights
    drafter: str | None
    drafter_reason: str
    drafter_weights: Weights | None
    kv_bits: int | None
    machine: int
    contexts: tuple[Context, ...]
    estimates: tuple[Estimate, ...]
    acceptance: float
    here: str | None  # the class of processors that stands in for this machine

    def figures(self) -> dict[str, Any]:
        """For a JSON object; sizes in bytes."""
        return {
            **{name: vars(self)[name] for name in ("name", "source", "role", "model_type", "kept", "precision")},
            "layers": dict(self.layers),
            "trained_context": self.context,
            "quantization": self.quantization,
            "weights": _weights(self.weights),
            "drafter": {
                "name": self.drafter,
                "reason": self.drafter_reason,
                "weights": None if self.drafter_weights is None else _weights(self.drafter_weights),
            },
            "kv_bits": self.kv_bits,
            "machine_bytes": self.machine,
            "contexts": [entry._asdict() for entry in self.contexts],
            "estimate": {
                "measured": False,
                "acceptance": self.acceptance,
                "this_machine": self.here,
                "depths": [_estimate(entry) for entry in self.estimates],
            },
        }


def _weights(found: Weights) -> dict[str, int]:
    return {
        "bytes": found.nbytes,
        "read_per_token": found.read,
        "parameters": found.parameters,
        "active_parameters": found.active,
        "experts": found.experts,
        "chosen_experts": found.chosen,
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    return {
        "chip": found.chip.name,
        "depth": found.depth,
        "tokens_per_round": round(found.tokens_per_round, 3),
        "speedup": round(found.speedup, 3),
        "source": found.chip.source,
    }


def outline(
    model: str,
    drafter: str | None = "auto",
    contexts: Sequence[int] = CONTEXTS,
    kv_bits: int | None = None,
    acceptance: float = ACCEPTANCE,
) -> Outline:
    """Look at a folder, a hub id or a demo; at a target together with its drafter, or at a drafter by itself.

    Raises CheckpointError for one that could not be loaded either, PairError for a named drafter that does not fit,
    RequestError for contexts or an acceptance that make no sense, or a drafter for a drafter.
    """
    if not contexts or min(contexts) < 1:
        raise RequestError(f"contexts are {list(contexts)}; give numbers of tokens above 0")
    with tempfile.TemporaryDirectory(prefix="mtp-mlx-") as scratch:
        places = _Places(Path(scratch).absolute())
        try:
            return _looked_at(_Question(model, drafter, sorted(contexts), kv_bits, acceptance), places)
        except MTPError as error:
            raise type(error)(places.in_words(str(error))) from error


class _Question(NamedTuple):
    """What somebody wants to know."""

    model: str
    drafter: str | None
    contexts: list[int]  # ascending
    kv_bits: int | None
    acceptance: float


def _looked_at(asked: _Question, places: "_Places") -> Outline:
    checkpoint = Sketch.open(places.find(asked.model))
    assert isinstance(checkpoint, Sketch)
    source = places.source if not checkpoint.bare else "config.json alone; there are no weights to look into"
    network = sketch(checkpoint)
    if is_target(checkpoint):
        choice = choose(asked.model, checkpoint, asked.drafter)
        if checkpoint.bare and choice.own and asked.drafter == "auto":
            choice = replace(choice, reason=f"{choice.reason}, as its config.json promises")
        name, reason, theirs = sketch_drafter(choice, checkpoint, network, places.find)
        paired = Paired(None if name is None else places.in_words(name), places.in_words(reason), theirs)
    elif asked.drafter not in ("auto", "none", None):
        raise RequestError(
            f"{asked.model} is a drafter itself and gets none, so --drafter {asked.drafter} says nothing; inspect its "
            "target with that drafter, or leave --drafter out"
        )
    else:
        paired = Paired(None, "a drafter by itself; its target is what to look at", None)
    return _told(asked, source, checkpoint, _Sums(network, paired.network, asked.kv_bits), paired)


class _Places:
    """Where names are looked up: a folder as it is, or a hollow copy of a repository that goes by the name of it."""

    def __init__(self, scratch: Path):
        self._scratch = scratch
        self._repositories: dict[str, str] = {}  # folder -> id
        self.source = ""  # of the latest

    def find(self, name: str) -> Path:
        if name in DEMOS or not is_hub_id(name) or Path(name).expanduser().exists():
            self.source = "files"
            return find(name)
        try:
            folder = hollow(name, self._scratch)
        except CheckpointError as error:
            try:
                folder = Path(snapshot_download(name, allow_patterns="config.json", local_files_only=True))
            except OSError:
                raise error from None
            self.source = "the hub's cache here"
            return folder
        self.source = "the hub: headers and small files"
        self._repositories[str(folder)] = name
        return folder

    def in_words(self, text: str) -> str:
        """With the ids of repositories in place of the folders of their copies."""
        for folder, name in self._repositories.items():
            text = text.replace(folder, name)
        return text


@dataclass(frozen=True)
class _Sums:
    """A target and perhaps its drafter, or a drafter by itself, and what they take."""

    network: Network
    beside: Network | None
    kv_bits: int | None

    @cached_property
    def dtype(self) -> mx.Dtype:
        return precision(self.network)

    @cached_property
    def own(self) -> Weights:
        return _weigh(self.network)

    @cached_property
    def theirs(self) -> Weights | None:
        return None if self.beside is None else _weigh(self.beside)

    def context(self, tokens: int, machine: int) -> Context:
        size = self.dtype.size
        cache = memory.kv_bytes(self.network.layout, tokens, self.kv_bits, size)
        if self.beside is not None:
            cache += memory.kv_bytes(self.beside.layout, tokens, None, size)  # never quantised
        total = self.own.nbytes + (self.theirs.nbytes if self.theirs else 0) + cache
        plain = self.own.read + memory.kv_read(self.network.layout, tokens, self.kv_bits, size)
        return Context(tokens, cache, total, total <= machine, plain, self._draft(tokens))

    def _draft(self, tokens: int) -> int | None:
        if self.beside is None or self.theirs is None:
            return None
        logits = self.own.output if self.beside.traffic.output is None else 0
        read = self.theirs.read + logits
        for entry in self.beside.layout:
            targets = isinstance(entry, Rows) and not entry.owned
            read += memory.kv_read((entry,), tokens, self.kv_bits if targets else None, self.dtype.size)
        return read

    def estimates(self, context: Context, acceptance: float) -> tuple[Estimate, ...]:
        """For each class of processors; none without a drafter."""
        if context.draft_read is None:
            return ()
        rest = context.plain_read - self.own.read  # keys and values are read once for a block
        factors = tuple((self.own.block(k + 1, OVERLAP) + rest) / context.plain_read for k in range(DEEPEST + 1))
        step = context.draft_read / context.plain_read
        return tuple(estimate(chip, step, factors, acceptance) for chip in chips())


def _weigh(network: Network) -> Weights:
    assert isinstance(network, nn.Module)
    return memory.weights(network, network.traffic)


def _told(asked: _Question, source: str, checkpoint: Sketch, sums: _Sums, paired: Paired) -> Outline:
    machine = memory.machine_bytes()
    contexts = tuple(sums.context(tokens, machine) for tokens in asked.contexts)
    here = this_chip(str(mx.device_info().get("device_name", "")))
    return Outline(
        name=asked.model,
        source=source,
        role="target" if is_target(checkpoint) else "drafter",
        model_type=checkpoint.model_type,
        layers=_kinds(sums.network.layout),
        kept=len([entry for entry in sums.network.layout if isinstance(entry, Recurrence) or entry.owned]),
        context=_trained(checkpoint.config),
        precision=str(sums.dtype).removeprefix("mlx.core."),
        quantization=_quantization(checkpoint),
        weights=sums.own,
        drafter=paired.name,
        drafter_reason=paired.reason,
        drafter_weights=sums.theirs,
        kv_bits=asked.kv_bits,
        machine=machine,
        contexts=contexts,
        estimates=sums.estimates(contexts[0], asked.acceptance),
        acceptance=asked.acceptance,
        here=here.name if here else None,
    )


def _kinds(layout: memory.Layout) -> dict[str, int]:
    found: Counter[str] = Counter()
    for entry in layout:
        if isinstance(entry, Rows):
            found["full attention" if entry.window is None else f"window of {entry.window}"] += entry.readers
        else:
            found["recurrent"] += 1
    return dict(found)


def _trained(config: Mapping[str, Any]) -> int | None:
    given = text_part(config).get("max_position_embeddings")
    return given if isinstance(given, int) else None


def _quantization(checkpoint: Sketch) -> str:
    settings = checkpoint.quantization()
    if settings is None:
        return "none"
    mode, bits, group = settings.get("mode", "affine"), settings.get("bits", "?"), settings.get("group_size", 64)
    own = sum(isinstance(value, dict) for value in settings.values())
    return f"{mode}, {bits} bits in groups of {group}" + (f", {own} modules otherwise" if own else "")
