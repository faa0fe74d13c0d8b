"""What several commands ask for: the parts of a pair and how they are held, parsed and loaded in one way."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer

from mtp_mlx import memory
from mtp_mlx.cli.display import loading
from mtp_mlx.cli.group import refuse_group
from mtp_mlx.drafter_bits import Bits
from mtp_mlx.errors import RequestError
from mtp_mlx.loading import Loaded, load_pair
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.store import Store, identity

Model = Annotated[
    str, typer.Option(help="Folder or hub id of the target; 'demo' and 'demo-qwen' are built in and work offline.")
]
Drafter = Annotated[
    str,
    typer.Option(
        help="Folder, file or hub id of the drafter, 'auto' for the one that belongs to the target, or 'none'; "
        "a smaller model of its family drafts as well."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Recast the weights: float32, bfloat16 or float16; 'auto' keeps the checkpoint's.")
]
DrafterBits = Annotated[
    str,
    typer.Option(
        help="Hold the drafter in 4 or 8 bits, or as it is with 'none'; 'auto' narrows one that reads too much."
    ),
]
KvBits = Annotated[
    str, typer.Option(help="Hold keys and values of full-attention layers in 4 or 8 bits; 'none' keeps them.")
]
Adapter = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of a fine-tune of the target in mlx-lm's format (LoRA, DoRA, full)."),
]
Depth = Annotated[str, typer.Option(help="Tokens to draft per round; 'auto' measures, 0 is plain decoding.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most probable token.")]
TopP = Annotated[float, typer.Option(help="Sample from the smallest set with this probability; 1 is off.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the best one's; 0 is off.")]
TopK = Annotated[int, typer.Option(help="Sample from this many tokens; 0 is off.")]
PromptCache = Annotated[
    str,
    typer.Option(
        help="Memory for what was read before, such as 512MB or 4GB; 'auto' is a quarter of what is free, 0 none."
    ),
]

DISK = 10 * 10**9  # bytes of the prompt cache on disk, unless told otherwise

DTYPES = {"auto": None, "float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_BITS: dict[str, int | None] = {"none": None, "8": 8, "4": 4}


@dataclass(frozen=True)
class Parts:
    """A pair as it was asked for. Raises RequestError for what no pair can be."""

    model: str
    drafter: str = "auto"
    dtype: str = "auto"
    drafter_bits: str = "auto"
    kv_bits: str = "none"
    adapter: str | None = None

    def load(self, group: mx.distributed.Group | None = None) -> Loaded:
        """All of it, or what is this machine's where a group of them computes the target."""
        if group is None:
            refuse_group()
        dtype, drafter_bits, kv_bits = (
            parse_dtype(self.dtype),
            _drafter_bits(self.drafter_bits),
            parse_kv_bits(self.kv_bits),
        )
        with loading(self.model, self.drafter):
            return load_pair(
                self.model,
                self.drafter,
                dtype,
                drafter_bits=drafter_bits,
                kv_bits=kv_bits,
                adapter=self.adapter,
                group=group,
            )


def parse_dtype(name: str) -> mx.Dtype | None:
    """The dtype of that name, None for 'auto'. Raises RequestError for any other."""
    if name not in DTYPES:
        raise RequestError(f"--dtype {name} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_kv_bits(given: str) -> int | None:
    """The number, None for 'none'. Raises RequestError for anything else."""
    if given not in _BITS:
        raise RequestError(f"--kv-bits {given} is not one of {', '.join(_BITS)}")
    return _BITS[given]


def _drafter_bits(given: str) -> Bits:
    if given == "auto":
        return "auto"
    if given not in _BITS:
        raise RequestError(f"--drafter-bits {given} is not one of auto, {', '.join(_BITS)}")
    return _BITS[given]


def parse_depth(depth: str) -> int | str:
    """'auto' or a number. Raises RequestError for anything else."""
    if depth == "auto":
        return depth
    try:
        return int(depth)
    except ValueError:
        raise RequestError(f"--depth {depth} is neither 'auto' nor a number of drafts") from None


def check_drawn(temperature: float, **filters: tuple[float, float]) -> None:
    """Raises RequestError for a filter of what is drawn, given with its value that is off, where nothing is drawn."""
    for name, (given, off) in filters.items():
        if temperature == 0 and given != off:
            option = name.replace("_", "-")
            raise RequestError(f"--{option} {given:g} is for texts with --temp above 0; at 0 nothing is drawn")


def parse_size(given: str, option: str) -> int | None:
    """Bytes, None for 'auto'. Raises RequestError for anything but a size."""
    if given == "auto":
        return None
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", given.strip(), re.IGNORECASE)
    if size is None:
        raise RequestError(f"{option} {given} is neither 'auto' nor a size such as 512MB or 4GB")
    return int(float(size[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[size[2].lower()])


@dataclass(frozen=True)
class Cached:
    """The prompt cache as it was asked for, in bytes."""

    memory: int | None = None  # None: a part of what is free
    folder: Path | None = None
    disk: int = DISK

    @classmethod
    def parse(cls, memory: str, folder: Path | None = None, disk: str = "auto") -> "Cached":
        """Raises RequestError for what is no size."""
        held, kept = parse_size(memory, "--prompt-cache"), parse_size(disk, "--prompt-cache-disk")
        if folder is None and kept is not None:
            raise RequestError(f"--prompt-cache-disk {disk} bounds --prompt-cache-dir, which is not given")
        return cls(held, folder, DISK if kept is None else kept)

    def open(self, loaded: Loaded) -> Prefixes:
        """For a pair that has been loaded, in a part of the memory that it leaves free."""
        held = max(0, memory.free_bytes()) // 4 if self.memory is None else self.memory
        store = None if self.folder is None else Store.open(self.folder, identity(loaded), self.disk)
        return Prefixes(loaded.pair, held, store=store)
