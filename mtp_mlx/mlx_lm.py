"""mlx-lm's own programs with a pair inside: python -m mtp_mlx.mlx_lm generate | chat | server | evaluate | perplexity.

The arguments, the help and the output are the program's. Only in this process, and only while it runs, the names by
which its module loads a model and writes a text stand for ours.
"""

import argparse
import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from mlx_lm import __version__ as mlx_lm_version
from mlx_lm.generate import BatchResponse
from mlx_lm.utils import load

from mtp_mlx.attach import attach
from mtp_mlx.batches import batch_generate
from mtp_mlx.drafter_bits import Bits
from mtp_mlx.errors import MTPError, RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.generation import Response, draw_seed
from mtp_mlx.hub import find
from mtp_mlx.loading import open_target
from mtp_mlx.model import Model
from mtp_mlx.sampling import Greedy, Sampler, choose_sampler


@dataclass(frozen=True)
class Inside:
    """What stands in the place of mlx-lm's names: its loading and a pair made of that, our generation."""

    drafter: str = "auto"
    drafter_bits: Bits = "auto"
    depth: int | str = "auto"
    seeded: bool = False  # the same text on every run, for which depths may not follow a clock

    def load(self, path_or_hf_repo: str, *, return_config: bool = False, **options: Any) -> tuple[Any, ...]:
        """A model as mlx-lm loads it, adapter and tokenizer included, with a drafter."""
        folder = str(open_target(find(path_or_hf_repo, open_target)).folder)
        loaded: Any = load(folder, return_config=True, **options)
        model, tokenizer, config = loaded
        attached = attach(
            model, self.drafter, tokenizer=tokenizer, name=path_or_hf_repo, drafter_bits=self.drafter_bits
        )
        return (attached, tokenizer, config) if return_config else (attached, tokenizer)

    def stream_generate(self, *arguments: Any, **options: Any) -> Iterator[Response]:
        seed = draw_seed() if self.seeded else None
        return stream_generate(*arguments, depth=self.depth, seed=seed, **options)

    def told(self, *arguments: Any, **options: Any) -> Iterator[Response]:
        """The same, and at the end what the drafts were worth."""
        last = None
        for last in self.stream_generate(*arguments, **options):
            yield last
        if last:
            stats = last.stats
            # On a line of its own: the text before it has not ended one.
            print(
                f"\nmtp-mlx: {stats.accepted} of {stats.drafted} drafts kept, in {stats.rounds} rounds", file=sys.stderr
            )

    def batch_generate(self, model: Model, tokenizer: Any, prompts: list[list[int]], **options: Any) -> BatchResponse:
        """Texts written together, with drafts."""
        seed = draw_seed() if self.seeded else None
        return batch_generate(model, tokenizer, prompts, depth=self.depth, seed=seed, **options)

    @property
    def drafts(self) -> bool:
        return self.drafter != "none" and self.depth != 0


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: Sequence[int] | None = None,
) -> Sampler:
    """What mlx-lm's function of that name would make, as a value of ours: it is computed with the round."""
    if temp == 0:
        return Greedy()
    return choose_sampler(
        temp,
        top_p,
        min_p,
        top_k,
        min_tokens_to_keep=min_tokens_to_keep,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=xtc_special_tokens or (),
    )


def refuse_several_machines(*arguments: Any, **options: Any) -> None:
    """In the place of mlx-lm's `sharded_load`."""
    raise RequestError("a pair runs on one machine; start the program without mlx.launch")


Names = Mapping[str, object]


@dataclass(frozen=True)
class Program:
    """One of mlx-lm's programs: what is put in its module, and what is to be said of drafts there."""

    names: Callable[[Inside, ModuleType], Names]
    note: Callable[[Inside], str | None] = lambda inside: None
    needs: str | None = None  # a package that mlx-lm leaves to the user


def _writing(inside: Inside, module: ModuleType) -> Names:
    return {"load": inside.load, "stream_generate": inside.told, "make_sampler": make_sampler}


def _chatting(inside: Inside, module: ModuleType) -> Names:
    names = {"load": inside.load, "stream_generate": inside.stream_generate, "make_sampler": make_sampler}
    return {**names, "sharded_load": refuse_several_machines}


def _reading(inside: Inside, module: ModuleType) -> Names:
    return {"load": inside.load}


def _evaluating(inside: Inside, module: ModuleType) -> Names:
    names = {"load": inside.load, "batch_generate": inside.batch_generate, "make_sampler": make_sampler}
    return names if inside.drafts else _reading(inside, module)


def _serving(inside: Inside, module: ModuleType) -> Names:
    kept = {} if inside.drafts else {"make_sampler": vars(module)["make_sampler"]}  # for mlx-lm's own batches
    return {**_chatting(inside, module), **kept, "ModelProvider": _provider(vars(module)["ModelProvider"], inside)}


def _provider(base: type, inside: Inside) -> type:
    """mlx-lm's, which loads its model before the server starts, and serves one request at a time where it drafts."""

    class ModelProvider(base):  # type: ignore[misc]
        def __init__(self, cli_args: Namespace) -> None:
            super().__init__(cli_args)
            # Here an error ends the program; in the thread that generates it would leave a server without a model.
            self.load_default()

        def _load(self, *arguments: Any, **options: Any) -> None:
            super()._load(*arguments, **options)
            if inside.drafts:
                self.is_batchable = False

    return ModelProvider


def _note_of_server(inside: Inside) -> str:
    if inside.drafts:
        return "requests are served one after the other, with drafts; --drafter none leaves mlx-lm's batches on"
    return "nothing is drafted, requests are served in mlx-lm's batches"


def _note_of_evaluate(inside: Inside) -> str:
    if inside.drafts:
        return "texts are scored without drafts, and written with them where a task has some written"
    return "nothing is drafted, texts are written in mlx-lm's batches"


def _note_of_perplexity(inside: Inside) -> str:
    return "nothing is drafted: a perplexity needs no text to be written"


PROGRAMS: Mapping[str, Program] = {
    "generate": Program(_writing),
    "chat": Program(_chatting),
    "server": Program(_serving, _note_of_server),
    "evaluate": Program(_evaluating, _note_of_evaluate, needs="lm_eval"),
    "perplexity": Program(_reading, _note_of_perplexity),
}


def run(name: str, inside: Inside, arguments: Sequence[str]) -> None:
    """Run a program of mlx-lm's. Raises MTPError where that cannot be."""
    program = PROGRAMS[name]
    if any(argument.startswith("--draft-model") for argument in arguments):
        raise RequestError(
            "--draft-model is mlx-lm's own way to draft; name a drafter, or a smaller model, by --drafter"
        )
    module = _module(name, program)
    inside = replace(inside, seeded=any(argument.startswith("--seed") for argument in arguments))
    asks = not {"-h", "--help"}.isdisjoint(arguments)
    note = None if asks else program.note(inside)
    if note:
        print(f"mtp-mlx: {note}", file=sys.stderr)
    with replaced(module, program.names(inside, module)), _arguments(name, arguments):
        vars(module)["main"]()


def _module(name: str, program: Program) -> ModuleType:
    try:
        return importlib.import_module(f"mlx_lm.{name}")
    except ModuleNotFoundError as error:
        if program.needs is None or error.name != program.needs:
            raise
        package = program.needs.replace("_", "-")
        raise RequestError(f"mlx-lm's {name} needs the package {package}; pip install {package}") from error


@contextmanager
def replaced(module: ModuleType, names: Names) -> Iterator[None]:
    """Other values for some names of a module, for a while. Raises RequestError where it has no such name."""
    absent = [name for name in names if name not in vars(module)]
    if absent:
        raise RequestError(
            f"mlx-lm {mlx_lm_version} has no {absent[0]} in {module.__name__}; install one that mtp-mlx was made for: "
            "pip install --upgrade mtp-mlx"
        )
    before = {name: vars(module)[name] for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def _arguments(name: str, arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [f"mtp_mlx.mlx_lm {name}", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _bits(text: str) -> Bits:
    return "auto" if text == "auto" else None if text == "none" else int(text)


def _depth(text: str) -> int | str:
    return "auto" if text == "auto" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mtp_mlx.mlx_lm",
        usage="%(prog)s PROGRAM [options]",
        description=f"mlx-lm's programs ({', '.join(PROGRAMS)}) with multi-token prediction inside. Beside "
        "these options, before or after PROGRAM, they take those of mlx-lm: PROGRAM --help shows them.",
        add_help=False,
        allow_abbrev=False,
    )
    options = parser.add_argument_group("options of mtp-mlx")
    options.add_argument(
        "--drafter",
        default="auto",
        metavar="NAME",
        help="a folder, hub id or file; auto: the one that belongs to the model; none: nothing is drafted",
    )
    options.add_argument(
        "--drafter-bits",
        type=_bits,
        default="auto",
        metavar="BITS",
        help="4 or 8; none: as it is; auto: 4 where it pays",
    )
    options.add_argument(
        "--depth", type=_depth, default="auto", metavar="N", help="drafts per round; auto: what measures fastest"
    )
    return parser


def main() -> None:
    """Exit codes: 0 done, 1 an error the user can act on, 2 wrong usage; otherwise the program's own."""
    parser = _parser()
    ours, rest = parser.parse_known_args()
    if not rest:
        parser.print_help(sys.stderr)
        sys.exit(2)
    if rest[0] in ("-h", "--help"):
        parser.print_help()
        sys.exit(0)
    name, *arguments = rest
    if name not in PROGRAMS:
        parser.error(f"there is no program {name!r} here; choose one of {', '.join(PROGRAMS)}")
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(parser.format_help())
    try:
        run(name, Inside(ours.drafter, ours.drafter_bits, ours.depth), arguments)
    except MTPError as error:
        print(f"mtp-mlx: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
