"""From a name to a pair: folder or hub id -> target, drafter and tokenizer, checked against each other.

The only module that knows architectures by name. A new one is a file in models/ and a line in a table here.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mtp_mlx import adapters, memory
from mtp_mlx.agreement import Agreement
from mtp_mlx.checkpoint import Checkpoint, TensorEntry, read_header, read_json
from mtp_mlx.draft_model import DraftModel
from mtp_mlx.drafter_bits import Bits, choose_bits, quantise
from mtp_mlx.errors import CheckpointError, MTPError, PairError, RequestError
from mtp_mlx.hub import DEMO, DEMOS, TENSORS, find, first_line
from mtp_mlx.model import Model
from mtp_mlx.models import base, gemma4, gemma4_assistant, qwen3_5, qwen3_5_mtp
from mtp_mlx.ngram import NOBODY
from mtp_mlx.pairs import HOW_TO_GET_A_HEAD, LOOKUP, Choice, choose, holds_head, sidecar
from mtp_mlx.sharding import Held, Unread, part_of, share
from mtp_mlx.types import Drafter, Pair, Target

Built = TypeVar("Built")
Builder = Callable[[mx.Dtype | None, Target], Drafter]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A pair ready to run, and where its parts came from."""

    pair: Pair
    tokenizer: TokenizerWrapper
    target: str
    drafter: str | None
    drafter_reason: str  # why this drafter, or why none
    adapter: str | None = None  # the fine-tune that was put onto the target, and what it is
    expected: bool = True  # the drafter was named, or is a part of the target; another choice is news to the user
    places: tuple[Path, ...] = ()  # folders, or a drafter's file, that all of it was read from
    networks: tuple[nn.Module, ...] = ()  # all weights: the target's, and the drafter's own
    config: Mapping[str, Any] = field(default_factory=dict)  # the target's config.json
    held: Held | None = None  # what this machine holds of the target, where several do


def _gemma4(checkpoint: Checkpoint) -> gemma4.Model:
    return _built(lambda config: gemma4.Model(gemma4.TextConfig.from_dict(config)), checkpoint)


def _gemma4_target(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> gemma4.Model:
    checkpoint.check_sizes()
    model = _gemma4(checkpoint)
    checkpoint.fill(model, model.sanitize, dtype)
    return model


def _gemma4_drafter(checkpoint: Checkpoint, dtype: mx.Dtype | None, target: Target) -> Drafter:
    assert isinstance(target, gemma4.Model), "families are compared before anything is loaded"
    checkpoint.check_sizes()
    config = _built(gemma4_assistant.Config.from_dict, checkpoint)
    _refuse_mismatch(config, target.config, checkpoint.folder)
    network = _assistant(checkpoint, dtype)
    if config.use_ordered_embeddings:
        _built(lambda _: gemma4_assistant.check_ordering(network.masked_embedding.token_ordering), checkpoint)
    return gemma4_assistant.Assistant(network, target)


def _assistant(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> gemma4_assistant.Model:
    network = _built(lambda config: gemma4_assistant.Model(gemma4_assistant.Config.from_dict(config)), checkpoint)
    checkpoint.fill(network, network.sanitize, dtype)
    return network


def _refuse_mismatch(assistant: gemma4_assistant.Config, target: gemma4.TextConfig, folder: Path) -> None:
    found = gemma4_assistant.mismatches(assistant, target)
    if found:
        raise PairError(
            f"the drafter in {folder} was made for another target: it expects {'; '.join(found)}; "
            "use the assistant released for this target, or --drafter none"
        )


def _qwen(checkpoint: Checkpoint) -> qwen3_5.Model:
    return _built(lambda config: qwen3_5.Model(qwen3_5.TextConfig.from_dict(config)), checkpoint)


def _qwen_target(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> qwen3_5.Model:
    checkpoint.check_sizes()
    model = _qwen(checkpoint)
    checkpoint.fill(model, model.sanitize, dtype, exact=("A_log",))
    return model


def _qwen_head(checkpoint: Checkpoint, dtype: mx.Dtype | None, target: Target) -> Drafter:
    assert isinstance(target, qwen3_5.Model), "families are compared before anything is loaded"
    if checkpoint.file is None:
        checkpoint = replace(checkpoint, file=sidecar(checkpoint))
    if not qwen3_5_mtp.is_head(checkpoint.names()):
        raise PairError(f"{checkpoint.name} holds no mtp head: {HOW_TO_GET_A_HEAD.format('ORIGINAL')}")
    tensors = qwen3_5_mtp.own_tensors(checkpoint.tensors())
    norm = tensors.get(qwen3_5_mtp.WIDTH)
    if norm is not None and norm.size != target.config.hidden_size:
        raise PairError(
            f"the head in {checkpoint.name} was made for another target: it expects hidden size {norm.size}, the "
            f"target has {target.config.hidden_size}; use the head of this target's original, or --drafter none"
        )
    # In the target's precision, whose embeddings and output head it works with.
    network = _head(checkpoint, dtype or target.model.norm.weight.dtype)
    return qwen3_5_mtp.Head(network, target)


def _head(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> qwen3_5_mtp.Network:
    network = _built(_head_network, checkpoint)
    tensors = qwen3_5_mtp.own_tensors(checkpoint.tensors())
    stored = _head_convention(checkpoint)
    level, how = (
        (logging.WARNING if stored.overruled else logging.INFO),
        "as the difference from 1" if stored.raw else "as applied",
    )
    _log.log(level, "%s: norms stored %s (%s)", checkpoint.name, how, stored.reason)
    for name in qwen3_5_mtp.exceptions(tensors, stored.raw):
        _log.warning("%s: %s is stored the other way, as its values show", checkpoint.name, name)
    checkpoint.fill(network, partial(qwen3_5_mtp.sanitize, raw=stored.raw), dtype)
    return network


def _head_network(config: Mapping[str, Any]) -> qwen3_5_mtp.Network:
    base.check_choices(config.get("text_config") or config, qwen3_5_mtp.ONLY)
    return qwen3_5_mtp.Network(qwen3_5.TextConfig.from_dict(config))


def _head_convention(checkpoint: Checkpoint) -> qwen3_5_mtp.Convention:
    files = [file for file in checkpoint.shards() if qwen3_5_mtp.is_head(read_header(file).names)]
    formats = {read_header(file).format for file in files}
    return qwen3_5_mtp.convention(
        checkpoint.tensors(),
        declared=_declared_convention(files[0].parent if files else checkpoint.folder),
        split=checkpoint.model_type == "qwen3_5_mtp" and qwen3_5_mtp.is_bare(checkpoint.names()),
        metadata=formats.pop() if len(formats) == 1 else None,
    )


def _declared_convention(folder: Path) -> qwen3_5_mtp.Convention | None:
    """What other programs write beside a head about its norms."""
    for name, key, meanings in qwen3_5_mtp.DECLARATIONS:
        try:
            said = read_json(folder / name).get(key) if (folder / name).is_file() else None
        except CheckpointError as error:
            _log.warning("%s", error)  # another program's note, of another program's kind perhaps
            continue
        if isinstance(said, str) and said in meanings:
            return qwen3_5_mtp.Convention(meanings[said], f"{key} in {name} is {said!r}")
    return None


_TARGETS: dict[str, Callable[[Checkpoint, mx.Dtype | None], Target]] = {
    "gemma4": _gemma4_target,
    "gemma4_text": _gemma4_target,
    "gemma4_unified": _gemma4_target,
    "gemma4_unified_text": _gemma4_target,
    "qwen3_5": _qwen_target,
    "qwen3_5_text": _qwen_target,
    "qwen3_5_moe": _qwen_target,
    "qwen3_5_moe_text": _qwen_target,
    "qwen3_next": _qwen_target,
}
_DRAFTERS: dict[str, Callable[[Checkpoint, mx.Dtype | None, Target], Drafter]] = {
    "gemma4_assistant": _gemma4_drafter,
    "gemma4_unified_assistant": _gemma4_drafter,
    "qwen3_5_mtp": _qwen_head,
}
# Drafters that can be looked at without their target.
_ALONE: dict[str, Callable[[Checkpoint, mx.Dtype | None], memory.Network]] = {
    "gemma4_assistant": _assistant,
    "gemma4_unified_assistant": _assistant,
    "qwen3_5_mtp": _head,
}
# Targets whose drafter comes as a part of them; so the folder of another such target can be named as the drafter.
_HEADS = {name: _qwen_head for name, build in _TARGETS.items() if build is _qwen_target}


@overload
def load(
    path_or_hf_repo: str | Path = DEMO,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    return_config: Literal[False] = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    drafter: str | Path | None = "auto",
    dtype: mx.Dtype | None = None,
    drafter_bits: Bits = "auto",
    kv_bits: int | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, TokenizerWrapper]: ...
@overload
def load(
    path_or_hf_repo: str | Path = DEMO,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    *,
    return_config: Literal[True],
    revision: str | None = None,
    trust_remote_code: bool = False,
    drafter: str | Path | None = "auto",
    dtype: mx.Dtype | None = None,
    drafter_bits: Bits = "auto",
    kv_bits: int | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, TokenizerWrapper, dict[str, Any]]: ...
def load(
    path_or_hf_repo: str | Path = DEMO,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    drafter: str | Path | None = "auto",
    dtype: mx.Dtype | None = None,
    drafter_bits: Bits = "auto",
    kv_bits: int | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, TokenizerWrapper] | tuple[Model, TokenizerWrapper, dict[str, Any]]:
    """Load a target with its drafter, and the tokenizer; and, if asked for, its config.json. As mlx-lm's `load`.

    `path_or_hf_repo` is a folder, a hub id or demo, `adapter_path` the folder or hub id of a fine-tune of it in
    mlx-lm's format. `tokenizer_config` is handed to the tokenizer. `lazy` changes nothing: weights are checked, hence
    read at once. `model_config` may only repeat what config.json says; `revision` and `trust_remote_code` are refused.

    `drafter` is a folder, a hub id, a file, "auto" for the one that belongs to the target, or None (or "none") for
    plain decoding; a smaller model of the target's family drafts as well. `dtype` recasts the weights that are not
    quantised; None keeps the checkpoint's. `drafter_bits` 4 or 8 quantises the drafter, None keeps it as it is, "auto"
    quantises one that would read too much beside a quantised target. `kv_bits` 4 or 8 quantises the keys and values of
    full-attention layers: the text is then that of plain decoding with the same `kv_bits`. With a `group` of several
    machines, `mx.distributed.init()`, each calls this and keeps its part of the target (docs/machines.md).

    Raises CheckpointError for a checkpoint that cannot be read, PairError for a drafter made for another target,
    RequestError for bits that are not to be had and for what mlx-lm could do and this cannot.
    """
    _refuse_foreign(tokenizer_config, revision, trust_remote_code)
    loaded = load_pair(
        _name(path_or_hf_repo),
        None if drafter is None else _name(drafter),
        dtype,
        drafter_bits=drafter_bits,
        kv_bits=kv_bits,
        adapter=None if adapter_path is None else _name(adapter_path),
        tokenizer_config=tokenizer_config,
        model_config=model_config,
        group=group,
    )
    if loaded.drafter is None and drafter == "auto":
        _log.warning("no drafter: %s", loaded.drafter_reason)
    model = Model(loaded.pair, loaded.config)
    return (model, loaded.tokenizer, dict(loaded.config)) if return_config else (model, loaded.tokenizer)


def _refuse_foreign(tokenizer_config: Mapping[str, Any] | None, revision: str | None, trust: bool) -> None:
    """Raises RequestError for what mlx-lm's `load` can be asked and this one cannot."""
    if trust or (tokenizer_config or {}).get("trust_remote_code"):
        raise RequestError("code that comes with a checkpoint is never run; leave trust_remote_code out")
    if revision is not None:
        raise RequestError(
            f"revision {revision!r}: a model is taken as it is on the hub now; download that revision into a folder "
            "(hf download MODEL --revision REVISION --local-dir FOLDER) and give the folder"
        )


def _refuse_changes(checkpoint: Checkpoint, model_config: Mapping[str, Any] | None) -> None:
    """Raises RequestError for entries that a checkpoint's config does not have in the same way."""
    for name, value in (model_config or {}).items():
        if name not in checkpoint.config or checkpoint.config[name] != value:
            said = f"{checkpoint.config[name]!r}" if name in checkpoint.config else "nothing"
            raise RequestError(
                f"model_config gives {name} {value!r}, its config.json says {said}; the network is built as "
                "that says: change it in a copy of the folder"
            )


def _name(given: str | Path) -> str:
    """A path is never a demo, whatever it is called."""
    return f"./{given}" if isinstance(given, Path) and str(given) in DEMOS else str(given)


def load_pair(
    model: str = DEMO,
    drafter: str | None = "auto",
    dtype: mx.Dtype | None = None,
    *,
    drafter_bits: Bits = "auto",
    kv_bits: int | None = None,
    adapter: str | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    group: mx.distributed.Group | None = None,
) -> Loaded:
    """As `load`, with the names of both parts and the reason for the choice of drafter.

    With a `group` of several machines each of them calls this, keeps its part of the target, and gets a pair that
    all of them have to run in step, one text after the other (docs/machines.md).
    """
    _check_bits(kv_bits)
    if dtype is not None and not mx.issubdtype(dtype, mx.floating):
        raise RequestError(f"weights cannot be {dtype}; give a floating-point type such as mx.float32")
    checkpoint = open_target(find(model, open_target))
    _refuse_changes(checkpoint, model_config)
    build = _TARGETS[checkpoint.model_type]
    agreed = Agreement(group)
    if adapter is not None and agreed.size > 1:
        raise RequestError(f"--adapter {adapter} cannot be put onto a part of a target; fuse it with mlx_lm.fuse first")
    choice = choose(model, checkpoint, drafter)
    # Before the target, which may take minutes: a mistyped drafter should be known at once.
    locate = cache(find)
    chosen, reason, build_drafter = _drafter(choice, checkpoint, locate)
    added = None if adapter is None else locate(adapter)
    target, held = _shared(build, checkpoint, dtype, group)
    tuned = None if added is None else f"{adapter}: {adapters.apply(_module(target), added)}"
    _check_kv(target, kv_bits)
    built, failure = _build(build_drafter, choice, dtype, target)
    if failure is not None:
        chosen, reason = None, failure
    reason += _narrowed(built, target, drafter_bits)
    network = _network_of(built)
    networks = [_module(target), *([] if network is None else [_module(network)])]
    mx.eval([part.parameters() for part in networks])
    agreed.compare(_identity(checkpoint, networks, type(built), dtype, kv_bits))
    places = [checkpoint.folder, *(locate(name) for name in (chosen, adapter) if name is not None)]
    return Loaded(
        Pair(target, built, kv_bits=kv_bits, agreed=agreed),
        _tokenizer(checkpoint, tokenizer_config),
        model,
        chosen,
        reason,
        tuned,
        choice.own,
        tuple(places),
        tuple(networks),
        checkpoint.config,
        held,
    )


def _shared(
    build: Callable[[Checkpoint, mx.Dtype | None], Target],
    checkpoint: Checkpoint,
    dtype: mx.Dtype | None,
    group: mx.distributed.Group | None,
) -> tuple[Target, Held | None]:
    """The target, or this machine's part of it."""
    if group is None or group.size() == 1:
        return build(checkpoint, dtype), None
    target = build(Unread.of(checkpoint), dtype)
    held = share(_network(target), part_of(group), str(checkpoint.folder))
    _log.info("%s", held)
    return target, held


def _identity(checkpoint: Checkpoint, networks: list[nn.Module], *options: object) -> str:
    """What has to be the same on all machines of a group."""
    names = ("mtp-mlx", "mlx", "mlx-lm")
    drafts: dict[str, mx.array] = dict(tree_flatten(networks[1].parameters())) if networks[1:] else {}
    shapes = [(name, array.shape, array.dtype) for name, array in drafts.items()]
    return str([dict(checkpoint.config), shapes, options, [version(name) for name in names]])


def _check_bits(kv_bits: int | None) -> None:
    if kv_bits not in (None, 4, 8):
        raise RequestError(f"keys and values cannot be held in {kv_bits} bits; give 4 or 8, or leave it out")


def _check_kv(target: Target, kv_bits: int | None) -> None:
    try:
        target.make_cache(kv_bits)
    except ValueError as error:
        raise RequestError(f"keys and values of this target: {error}; leave --kv-bits out") from error


def fetch(model: str, drafter: str | None = "auto") -> None:
    """Bring the files of both parts here, so that loading them reads the disk only.

    Raises MTPError for a part that the user has named; what becomes of another drafter is for the loading to say.
    """
    choice = choose(model, open_target(find(model, open_target)), drafter)
    try:
        first_found(choice)
    except MTPError:
        if choice.own:
            raise


def first_found(choice: Choice) -> str | None:
    """The first of the drafters whose files are here or can be brought here; None where there is none to find.

    Raises CheckpointError where none of them can.
    """
    failures: list[str] = []
    for name in choice.drafters:
        try:
            find(name)
        except MTPError as error:
            failures.append(str(error))
        else:
            return name
    if failures:
        raise CheckpointError("; ".join(failures))
    return None


def open_target(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises CheckpointError unless it is a target, by what its config says."""
    _refuse_adapter(folder)
    checkpoint = Checkpoint.open(folder)
    _refuse_unknown(checkpoint)
    if checkpoint.model_type not in _TARGETS:
        raise CheckpointError(_unknown_target(checkpoint))
    return checkpoint


def role(model_type: str) -> str | None:
    """What a checkpoint of this model_type is for us: 'target', 'drafter', or None for nothing we can run."""
    return "target" if model_type in _TARGETS else "drafter" if model_type in _DRAFTERS else None


def _narrowed(drafter: Drafter, target: Target, bits: Bits) -> str:
    """Quantise a drafter if that was asked for or pays; what is to be said of it."""
    network = _network_of(drafter)
    if network is None:
        if isinstance(bits, int):
            raise RequestError(f"there is no drafter to hold in {bits} bits; name one with --drafter")
        return ""
    if isinstance(drafter, DraftModel) and bits == "auto":
        bits = None  # it has the form that was chosen
    chosen, reason = choose_bits(bits, _network(target), network)
    if chosen is None:
        return ""
    quantise(_module(network), chosen)
    return f"; {reason}"


def _network_of(drafter: Drafter) -> memory.Network | None:
    """The weights that a drafter has of its own."""
    if isinstance(drafter, gemma4_assistant.Assistant | qwen3_5_mtp.Head):
        return drafter.network
    return _network(drafter.model) if isinstance(drafter, DraftModel) else None


def _module(network: Target | memory.Network) -> nn.Module:
    assert isinstance(network, nn.Module)
    return network


def _network(target: Target) -> gemma4.Model | qwen3_5.Model:
    assert isinstance(target, gemma4.Model | qwen3_5.Model)
    return target


class Paired(NamedTuple):
    """The drafter that would be loaded with a target."""

    name: str | None
    reason: str
    network: memory.Network | None


def sketch(checkpoint: Checkpoint) -> memory.Network:
    """The network of a target, or of a drafter by itself, whichever a folder holds. Raises CheckpointError."""
    _refuse_unknown(checkpoint)
    if checkpoint.model_type in _ALONE:
        return _ALONE[checkpoint.model_type](checkpoint, None)
    build = _TARGETS.get(checkpoint.model_type)
    if build is None:
        raise CheckpointError(_unknown_target(checkpoint))
    return _network(build(checkpoint, None))


def is_target(checkpoint: Checkpoint) -> bool:
    return checkpoint.model_type in _TARGETS


def sketch_drafter(
    choice: Choice, checkpoint: Checkpoint, target: memory.Network, locate: Callable[[str], Path]
) -> Paired:
    """The drafter that a choice comes to, made for the network of its target. Raises MTPError as loading does."""
    name, reason, builder = _drafter(choice, checkpoint, locate)
    whole = cast(Target, target)
    drafter, failure = _build(builder, choice, None, whole)
    if failure is not None:
        return Paired(None, failure, None)
    return Paired(name, reason + _narrowed(drafter, whole, "auto"), _network_of(drafter))


def _drafter(
    choice: Choice, target: Checkpoint, locate: Callable[[str], Path] = find
) -> tuple[str | None, str, Builder | None]:
    """The first of the drafters that is there and drafts for such targets: its name, why, and how it is built.

    Raises MTPError only for one that the user has named or that is a part of the target.
    """
    failures: list[str] = []
    for name in choice.drafters:
        try:
            return name, choice.reason, _drafter_builder(locate(name), target)
        except MTPError as error:
            if choice.own:
                raise
            failures.append(str(error))
    return None, _without(choice, failures), None


def _build(build: Builder | None, choice: Choice, dtype: mx.Dtype | None, target: Target) -> tuple[Drafter, str | None]:
    """The drafter, or nobody and why."""
    try:
        return (NOBODY if build is None else build(dtype, target)), None
    except MTPError as error:
        if choice.own:
            raise
        return NOBODY, _without(choice, [str(error)])


def _without(choice: Choice, failures: list[str]) -> str:
    return f"{'; '.join([choice.reason, *failures])}: {LOOKUP}" if failures else choice.reason


def _drafter_builder(path: Path, target: Checkpoint) -> Builder:
    if path.name.endswith(TENSORS):
        if target.model_type not in _HEADS:
            raise PairError(f"{path} is a file; the drafters of {target.model_type!r} targets are folders")
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}; give the file that holds the tensors mtp.*, or its folder")
        # Tensors alone: the config is the target's.
        return partial(_qwen_head, replace(target, folder=path.parent, file=path))
    if path.is_dir() and not (path / "config.json").is_file() and target.model_type in _HEADS:
        for file in sorted(path.glob("*" + TENSORS)):
            if holds_head(file):
                return _drafter_builder(file, target)
    checkpoint = target.open(path)
    _refuse_unknown(checkpoint)
    if _is_smaller_model(checkpoint, target):
        return partial(_draft_model, checkpoint, target)
    build = (_DRAFTERS | _HEADS).get(checkpoint.model_type)
    if build is None:
        raise PairError(
            f"{path} has model_type {checkpoint.model_type!r}, which does not draft for {target.model_type!r} targets; "
            f"known drafters: {', '.join(sorted(_DRAFTERS))}, or a smaller model of the target's family"
        )
    if (build is _qwen_head) != (target.model_type in _HEADS):
        raise PairError(
            f"{path} has model_type {checkpoint.model_type!r}, which does not draft for {target.model_type!r} targets; "
            "use the drafter released for this target, or --drafter none"
        )
    return partial(build, checkpoint)


def _is_smaller_model(checkpoint: Checkpoint, target: Checkpoint) -> bool:
    """Whether a checkpoint is to draft as a whole. A Qwen as wide as the target is asked for its head alone."""
    build = _TARGETS.get(checkpoint.model_type)
    if build is None or build is not _TARGETS[target.model_type]:
        return False
    return build is not _qwen_target or _width(checkpoint) != _width(target)


def _width(checkpoint: Checkpoint) -> object:
    """As the config says; whether that makes sense is seen later."""
    return dict(checkpoint.config.get("text_config") or checkpoint.config).get("hidden_size")


def _draft_model(
    checkpoint: Checkpoint, target_checkpoint: Checkpoint, dtype: mx.Dtype | None, target: Target
) -> Drafter:
    model = _TARGETS[checkpoint.model_type](checkpoint, dtype)
    if model.vocabulary != target.vocabulary or not _same_tokens(checkpoint, target_checkpoint):
        raise PairError(
            f"{checkpoint.folder} has another vocabulary than the target ({model.vocabulary} and {target.vocabulary} "
            "tokens), so its drafts would mean something else; use a smaller model of the same release"
        )
    return DraftModel(model)


def _same_tokens(one: Checkpoint, other: Checkpoint) -> bool:
    files = [checkpoint.folder / "tokenizer.json" for checkpoint in (one, other)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    return bool(_tokenizer(one).get_vocab() == _tokenizer(other).get_vocab())


def _unknown_target(checkpoint: Checkpoint) -> str:
    if checkpoint.model_type in _DRAFTERS:
        return f"{checkpoint.folder} is a drafter; give its target with --model and this folder with --drafter"
    return (
        f"{checkpoint.folder} has model_type {checkpoint.model_type!r}; supported targets: "
        f"{', '.join(sorted(_TARGETS))}"
    )


def _refuse_adapter(folder: Path) -> None:
    if (folder / adapters.CONFIG).is_file() and not (folder / "config.json").is_file():
        base_model = adapters.base_model(folder) or "the model that it was made for"
        raise CheckpointError(f"{folder} is an adapter, not a model; use --model {base_model} --adapter {folder}")


def _refuse_unknown(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for what looks like a known family and is not."""
    text = checkpoint.config.get("text_config")
    inner = str(text.get("model_type", "")) if isinstance(text, Mapping) else ""
    strange = next((name for name in (checkpoint.model_type, inner) if name.startswith("qwen4_exp")), None)
    if strange:
        raise CheckpointError(
            f"{checkpoint.folder} has model_type {strange!r} (Flash-Next): its layers and its mtp head are of another "
            "architecture than Qwen 3.5/3.6/3.8 and are not supported"
        )


def _built(build: Callable[[Mapping[str, Any]], Built], checkpoint: Checkpoint) -> Built:
    """What `build` makes of a checkpoint's config. Raises CheckpointError where the config makes no sense."""
    try:
        return build(checkpoint.config)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'} lacks the entry {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{checkpoint.folder} cannot be used: {error}") from error


# --------------------------------------------------------------------------- weights that are in memory already


def hollow_target(checkpoint: Checkpoint) -> Target:
    """The network that a target's config describes, to be given its weights.

    Raises PairError for a model that is no target, CheckpointError for a config that makes no sense.
    """
    build = _TARGETS.get(checkpoint.model_type)
    if build is None:
        raise PairError(
            f"a model of type {checkpoint.model_type!r} has no drafter here; supported are "
            f"{', '.join(sorted(_TARGETS))}"
        )
    return _qwen(checkpoint) if build is _qwen_target else _gemma4(checkpoint)


def pair_up(
    target: Target,
    model: str,
    checkpoint: Checkpoint,
    drafter: str | None = "auto",
    *,
    drafter_bits: Bits = "auto",
    kv_bits: int | None = None,
) -> tuple[Pair, str | None, str]:
    """A target that is in memory with its drafter, which is loaded; the drafter's name, and the reason for it.

    `checkpoint` is where the target came from. Where that is not known its folder is none, and only the config speaks.
    """
    _check_bits(kv_bits)
    _check_kv(target, kv_bits)
    choice = choose(model, checkpoint, drafter)
    chosen, reason, build_drafter = _drafter(choice, checkpoint)
    built, failure = _build(build_drafter, choice, None, target)
    if failure is not None:
        chosen, reason = None, failure
    reason += _narrowed(built, target, drafter_bits)
    network = _network_of(built)
    mx.eval([_module(part).parameters() for part in (target, network) if part is not None])
    return Pair(target, built, kv_bits=kv_bits), chosen, reason


# --------------------------------------------------------------------------- what converters have to know


def head_names(names: Collection[str]) -> dict[str, str]:
    """Which of a file's tensors are an mtp head's, and what each is called below `mtp.`; empty if there is no head."""
    return qwen3_5_mtp.own_names(names)


def unfused_head(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A head's tensors with one stack of experts for each projection. Raises ValueError for a missing expert."""
    return qwen3_5_mtp.unfused(tensors)


def stored_raw(tensors: Mapping[str, TensorEntry]) -> bool | None:
    """Whether the tensors of a file are laid out as released; None where none of them tells."""
    return qwen3_5.is_raw(tensors)


def sidecar_name(config: Mapping[str, Any]) -> str:
    """What a head's file is to be called beside a converted target, so that mlx-lm still loads that.

    mlx-lm reads model*.safetensors and leaves out what is named mtp.*, which keeps the head in copies and uploads of
    the folder; but of a converted Qwen3-Next it leaves out nothing.
    """
    return "mtp" + TENSORS if config.get("model_type") == "qwen3_next" else "model-mtp" + TENSORS


def has_own_head(config: Mapping[str, Any]) -> bool:
    """Whether a target's drafter comes as a part of it."""
    return config.get("model_type") in _HEADS


def refuse_headless(config: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError for a model without an mtp head of its own."""
    kind = config.get("model_type")
    if kind in _HEADS:
        return
    if _DRAFTERS.get(str(kind)) is _qwen_head:
        raise CheckpointError(f"{name} is an mtp head already (model_type {kind!r}); name it with --drafter")
    advice = (
        "its drafter is a checkpoint of its own; name that with --drafter"
        if kind in _TARGETS
        else f"models with one: {', '.join(_HEADS)}"
    )
    raise CheckpointError(f"{name} has model_type {kind!r}, which has no mtp head inside; {advice}")


def check_drafter_folder(folder: Path, target: Checkpoint) -> None:
    """Raises CheckpointError or PairError where a folder holds no drafter for a target, as their configs say."""
    _drafter_builder(folder, target)
    checkpoint = Checkpoint.open(folder)
    if _DRAFTERS.get(checkpoint.model_type) is _gemma4_drafter:
        config = _built(gemma4_assistant.Config.from_dict, checkpoint)
        _refuse_mismatch(config, _built(gemma4.TextConfig.from_dict, target), folder)


def for_mlx_lm(checkpoint: Checkpoint) -> dict[str, Any]:
    """Entries of config.json for which mlx-lm assumes another default than the released models have."""
    if _TARGETS.get(checkpoint.model_type) is not _gemma4_target:
        return {}
    text = checkpoint.config.get("text_config")
    width = _built(gemma4.TextConfig.from_dict, checkpoint).per_layer_width
    if not isinstance(text, Mapping):
        return {"hidden_size_per_layer_input": width}
    # mlx-lm lets the number outside the text's config win, and takes that of the largest vocabulary if there is none.
    return {"vocab_size": text["vocab_size"], "text_config": {**text, "hidden_size_per_layer_input": width}}


def _tokenizer(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> TokenizerWrapper:
    if not (checkpoint.folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{checkpoint.folder} has no tokenizer.json; download the whole checkpoint")
    # The limit is ours to check, against the model's context; transformers would only warn, on stderr. And without
    # a no it would ask on a terminal whether to run a tokenizer's own code.
    options = {"model_max_length": 2**40, **(config or {}), "trust_remote_code": False}
    eos = checkpoint.eos_token_ids()
    try:
        tokenizer: TokenizerWrapper = load_tokenizer(checkpoint.folder, options, eos_token_ids=eos)
    except Exception as error:  # tokenizers raises bare Exceptions, transformers nearly anything
        raise CheckpointError(f"the tokenizer in {checkpoint.folder} cannot be read: {first_line(error)}") from error
    return tokenizer
