"""What there is to know of a machine before a model is loaded: facts are read one by one, then judged.

A fact that cannot be read is unknown, never guessed, and keeps no other from being read. Apple's GPU generations are
those of mx.device_info(): 13 is M1, 14 M2, 15 M3, 16 M4, 17 M5.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import mlx.core as mx
from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError

from mtp_mlx.programs import compiles

Status = Literal["ok", "warning", "problem", "unknown"]
Value = TypeVar("Value")

MLX, MLX_LM, BEYOND_MLX_LM = (0, 32, 4), (0, 32, 2), (0, 33)  # as the package requires them
OLDEST_MACOS = (14, 0)  # of MLX
WIDE_AFFINE = 15  # generation from which affine kernels read weights once for a few rows (mlx#3764)
MATRIX_UNITS, MATRIX_MACOS = 17, (26, 2)  # what MLX asks for before it uses a GPU's matrix units
ROOM = 20e9  # bytes: one model of the smaller sizes, in 4 bits
SECONDS = 8  # that a program or the hub is given to answer


class Hub(NamedTuple):
    """What the hub said."""

    address: str
    offline: bool  # asked for by the user
    problem: str | None  # why it does not answer
    user: str | None  # whose token there is; None without one
    refused: bool = False  # there is a token, and the hub does not take it


@dataclass(frozen=True)
class Readers:
    """Where facts come from. Tests put recorded answers in their place."""

    run: Callable[[Sequence[str]], str]  # what a program prints
    device: Callable[[], Mapping[str, object]]
    metal: Callable[[], bool]
    system: Callable[[], tuple[str, str, str]]  # kind, processor of this Python, version of Python
    version: Callable[[str], str]  # of an installed package
    cores: Callable[[], int]
    memory: Callable[[], int]  # where there is no sysctl
    compiles: Callable[[], bool]
    disk: Callable[[], tuple[str, int]]  # folder of the hub cache, bytes free
    hub: Callable[[], Hub]


@dataclass(frozen=True)
class Facts:
    """What is known of a machine; None is unknown, and `failed` says why."""

    failed: Mapping[str, str]
    system: str | None
    processor: str | None  # that Python was built for
    python: str | None
    translated: bool | None  # by Rosetta
    macos: tuple[int, ...] | None
    chip: str | None
    architecture: str | None  # of the GPU, as Metal calls it
    gpu_cores: int | None
    performance_cores: int | None
    efficiency_cores: int | None
    cores: int | None
    memory: int | None  # bytes
    working_set: int | None  # bytes that the GPU may hold
    wired_limit: int | None  # megabytes, 0 for the system's own choice
    low_power: bool | None
    metal: bool | None
    mlx: tuple[int, ...] | None
    mlx_lm: tuple[int, ...] | None
    compiles: bool | None
    disk: tuple[str, int] | None
    hub: Hub | None

    @property
    def mac(self) -> bool:
        return self.system == "Darwin"

    @property
    def generation(self) -> int | None:
        """Of an Apple GPU."""
        found = re.fullmatch(r"applegpu_g(\d+)[a-z]*", self.architecture or "")
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Check:
    """One finding: what is there, what it means for drafting, and what to do."""

    name: str
    status: Status
    found: str
    means: str = ""
    remedy: str = ""


def examine(readers: Readers) -> list[Check]:
    """Every finding, in the order of a machine's layers. Raises nothing."""
    facts = read(readers)
    findings = (judge(facts) for judge in (_python, _system, _chip, _kernels, _memory, _power, _mlx, _mlx_lm))
    rest = (judge(facts) for judge in (_compiler, _disk, _hub))
    return [check for part in (*findings, *rest) for check in part]


def can_run(checks: Sequence[Check]) -> bool:
    """Whether drafting works at all; warnings are about speed and comfort."""
    return not any(check.status == "problem" for check in checks)


def figures(checks: Sequence[Check]) -> dict[str, Any]:
    """For a JSON object."""
    return {"can_run": can_run(checks), "checks": [asdict(check) for check in checks]}


# --------------------------------------------------------------------------- reading


class _Reading:
    """Reads facts; those that cannot be read are None, with the reason kept."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}

    def __call__(self, name: str, reader: Callable[[], Value]) -> Value | None:
        try:
            return reader()
        except Exception as error:  # whatever a foreign program or library does, the others are still worth reading
            lines = str(error).strip().splitlines()
            self.failed[name] = lines[0] if lines else type(error).__name__
            return None


def read(readers: Readers) -> Facts:
    """The facts of a machine. Raises nothing."""
    known = _Reading()
    kind = known("system", readers.system) or (None, None, None)
    mac = kind[0] == "Darwin"
    device = known("device", readers.device) or {}

    def sysctl(name: str) -> int | None:
        return known(name, lambda: int(readers.run(("sysctl", "-n", name)))) if mac else None

    translated = sysctl("sysctl.proc_translated")  # the name is known on Apple silicon only
    brand = known("chip", lambda: readers.run(("sysctl", "-n", "machdep.cpu.brand_string")).strip()) if mac else None
    return Facts(
        failed=known.failed,
        system=kind[0],
        processor=kind[1],
        python=kind[2],
        translated=None if translated is None else bool(translated),
        macos=known("macos", lambda: numbers(readers.run(("sw_vers", "-productVersion")))) if mac else None,
        chip=brand or _text(device.get("device_name")),
        architecture=_text(device.get("architecture")),
        gpu_cores=known("gpu_cores", lambda: _gpu_cores(readers)) if mac else None,
        performance_cores=sysctl("hw.perflevel0.physicalcpu"),
        efficiency_cores=sysctl("hw.perflevel1.physicalcpu"),
        cores=known("cores", readers.cores),
        memory=sysctl("hw.memsize") if mac else known("memory", readers.memory),
        working_set=_number(device.get("max_recommended_working_set_size")),
        wired_limit=sysctl("iogpu.wired_limit_mb"),
        low_power=known("low_power", lambda: low_power(readers.run(("pmset", "-g")))) if mac else None,
        metal=known("metal", readers.metal),
        mlx=known("mlx", lambda: numbers(readers.version("mlx"))),
        mlx_lm=known("mlx_lm", lambda: numbers(readers.version("mlx-lm"))),
        compiles=known("compiles", readers.compiles),
        disk=known("disk", readers.disk),
        hub=known("hub", readers.hub),
    )


def numbers(text: str) -> tuple[int, ...]:
    """'26.1' -> (26, 1). Raises ValueError for a text that does not begin with a number."""
    found = re.match(r"\d+(\.\d+)*", text.strip())
    if not found:
        raise ValueError(f"{text.strip()[:40]!r} is no version")
    return tuple(int(part) for part in found[0].split("."))


def low_power(settings: str) -> bool:
    """Whether `pmset -g` tells of low power mode. Raises ValueError where it says nothing of it."""
    found = re.search(r"^\s*(lowpowermode|powermode)\s+(\d)", settings, re.MULTILINE)
    if not found:
        raise ValueError("pmset says nothing of it")
    return found[2] == "1"  # of powermode 2 is high power


def _gpu_cores(readers: Readers) -> int:
    found = re.search(r"Total Number of Cores:\s*(\d+)", readers.run(("system_profiler", "SPDisplaysDataType")))
    if not found:
        raise ValueError("system_profiler does not say")
    return int(found[1])


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


# --------------------------------------------------------------------------- judging


def _unknown(name: str, facts: Facts, fact: str) -> Check:
    reason = facts.failed.get(fact)
    return Check(name, "unknown", f"unknown ({reason})" if reason else "unknown")


def _python(facts: Facts) -> Iterator[Check]:
    if facts.processor is None:
        yield _unknown("python", facts, "system")
        return
    found = f"{facts.python} for {facts.processor}"
    if facts.mac and facts.processor != "arm64":
        rosetta = facts.translated or "Apple" in (facts.chip or "")
        yield Check(
            "python",
            "problem",
            found + (", translated by Rosetta" if rosetta else ""),
            "MLX has no GPU for a Python made for Intel processors",
            "install a Python for arm64 and set up the environment again with it"
            if rosetta
            else "use a Mac with an M1 or later",
        )
    else:
        yield Check("python", "ok", found)


def _system(facts: Facts) -> Iterator[Check]:
    if not facts.mac:
        if facts.system is None:
            yield _unknown("system", facts, "system")
        else:
            yield Check(
                "system",
                "warning",
                f"{facts.system}, no Mac",
                "this machine's processor does the work: right, but slow; drafting is used where it is measured to pay",
            )
    elif facts.macos is None:
        yield _unknown("system", facts, "macos")
    else:
        found = f"macOS {_dotted(facts.macos)}"
        if facts.macos < OLDEST_MACOS:
            yield Check(
                "system", "problem", found, "MLX does not run on it", f"update to macOS {OLDEST_MACOS[0]} or later"
            )
        else:
            yield Check("system", "ok", found)


def _chip(facts: Facts) -> Iterator[Check]:
    if facts.chip is None:
        yield _unknown("chip", facts, "chip")
        return
    counted = [
        (facts.performance_cores, "performance cores"),
        (facts.efficiency_cores, "efficiency cores"),
        (facts.gpu_cores, "GPU cores"),
    ]
    if facts.performance_cores is None:
        counted = [(facts.cores, "cores"), *counted[1:]]
    known = [f"{count} {name}" for count, name in counted if count is not None]
    yield Check("chip", "ok", ", ".join([facts.chip, *known]))


def _kernels(facts: Facts) -> Iterator[Check]:
    if not facts.mac:
        return
    if facts.metal is False:
        yield Check(
            "gpu",
            "warning",
            "MLX finds no Metal GPU",
            "everything is computed on the processor, far slower",
            "run outside a virtual machine, in a session of a user who is logged in",
        )
    elif facts.generation is None:
        named = f" ({facts.architecture})" if facts.architecture else ""
        yield Check("gpu", "unknown", f"generation unknown{named}")
    else:
        yield _wide_kernels(facts, facts.generation)
        yield from _matrix_units(facts, facts.generation)


def _wide_kernels(facts: Facts, generation: int) -> Check:
    found = f"generation {generation} ({facts.architecture})"
    if generation >= WIDE_AFFINE:
        return Check("gpu", "ok", found, "a few drafts are verified while the weights are read once")
    return Check(
        "gpu",
        "warning",
        found,
        "with affine quantisation (the usual 4 and 8 bits) each draft that is verified costs nearly as much as a plain "
        "step here, so there is little to win; the kernels for nvfp4, mxfp4 and mxfp8 do better",
        "use a model in nvfp4, mxfp4 or mxfp8, or make one: mtp-mlx convert ORIGINAL OUTPUT --mode nvfp4",
    )


def _matrix_units(facts: Facts, generation: int) -> Iterator[Check]:
    least = MATRIX_UNITS + (1 if (facts.architecture or "").endswith("p") else 0)
    if generation < least:
        return
    if facts.macos is None:
        yield _unknown("matrix units", facts, "macos")
    elif facts.macos < MATRIX_MACOS:
        yield Check(
            "matrix units",
            "warning",
            f"not used on macOS {_dotted(facts.macos)}",
            "prompts are read more slowly than this GPU can",
            f"update to macOS {_dotted(MATRIX_MACOS)} or later",
        )
    else:
        yield Check("matrix units", "ok", "used by MLX", "prompts are read faster")


def _memory(facts: Facts) -> Iterator[Check]:
    if facts.memory is None:
        yield _unknown("memory", facts, "hw.memsize" if facts.mac else "memory")
    else:
        yield Check("memory", "ok", f"{facts.memory / 2**30:.0f} GiB")
    if not facts.mac:
        return
    limit = facts.wired_limit * 2**20 if facts.wired_limit else facts.working_set
    if limit is None:
        yield _unknown("gpu memory", facts, "iogpu.wired_limit_mb")
        return
    source = "set by hand" if facts.wired_limit else "the system's choice"
    found = f"{limit / 2**30:.1f} GiB ({source})"
    fits = f"weights, drafter and cache together up to {limit / 2**30:.1f} GiB stay fast"
    if facts.memory and limit > 0.92 * facts.memory:
        yield Check(
            "gpu memory",
            "warning",
            found,
            "this leaves the system so little that it may swap or stop",
            "lower it: sudo sysctl iogpu.wired_limit_mb=0 gives it back to the system",
        )
    elif facts.wired_limit or facts.memory is None:
        yield Check("gpu memory", "ok", found, fits)
    else:
        more = max(int(0.85 * facts.memory / 2**20), limit >> 20)
        hint = f"for a larger model, until the next restart: sudo sysctl iogpu.wired_limit_mb={more}"
        yield Check("gpu memory", "ok", found, fits, hint if more << 20 > limit else "")


def _power(facts: Facts) -> Iterator[Check]:
    if not facts.mac:
        return
    if facts.low_power is None:
        yield _unknown("power", facts, "low_power")
    elif facts.low_power:
        yield Check(
            "power",
            "warning",
            "low power mode",
            "the GPU is slowed down; measured speeds, and the depths chosen by them, are those of this mode",
            "turn it off in System Settings, Battery",
        )
    else:
        yield Check("power", "ok", "no low power mode")


def _mlx(facts: Facts) -> Iterator[Check]:
    if facts.mlx is None:
        yield _unknown("mlx", facts, "mlx")
    elif facts.mlx < MLX:
        yield Check(
            "mlx",
            "problem",
            _dotted(facts.mlx),
            f"{_dotted(MLX)} or later is needed; 0.32.3 brought fused attention for heads of 512 and the gated delta "
            "kernels",
            f"pip install 'mlx>={_dotted(MLX)}'",
        )
    else:
        yield Check("mlx", "ok", _dotted(facts.mlx), "has fused attention for heads of 512 and gated delta kernels")


def _mlx_lm(facts: Facts) -> Iterator[Check]:
    if facts.mlx_lm is None:
        yield _unknown("mlx-lm", facts, "mlx_lm")
    elif not MLX_LM <= facts.mlx_lm < BEYOND_MLX_LM:
        span = f">={_dotted(MLX_LM)},<{_dotted(BEYOND_MLX_LM)}"
        yield Check("mlx-lm", "problem", _dotted(facts.mlx_lm), f"{span} is needed", f"pip install 'mlx-lm{span}'")
    else:
        yield Check("mlx-lm", "ok", _dotted(facts.mlx_lm))


def _compiler(facts: Facts) -> Iterator[Check]:
    slower = "rounds are built anew each time, which is slower"
    if facts.compiles is None:
        yield _unknown("compiler", facts, "compiles")
    elif facts.compiles:
        yield Check("compiler", "ok", "mx.compile works", "rounds are built once and replayed")
    elif facts.metal:
        yield Check("compiler", "warning", "mx.compile is turned off", slower, "unset MLX_DISABLE_COMPILE")
    else:
        remedy = "install a C++ compiler that is called g++, and leave MLX_DISABLE_COMPILE unset"
        yield Check("compiler", "warning", "mx.compile does nothing", slower, remedy)


def _disk(facts: Facts) -> Iterator[Check]:
    if facts.disk is None:
        yield _unknown("disk", facts, "disk")
        return
    folder, free = facts.disk
    found = f"{free / 1e9:.0f} GB free for the hub cache in {folder}"
    if free < ROOM:
        yield Check("disk", "warning", found, "larger models do not fit", "make room, or move the cache: HF_HOME")
    else:
        yield Check("disk", "ok", found)


def _hub(facts: Facts) -> Iterator[Check]:
    if facts.hub is None:
        yield _unknown("hub", facts, "hub")
        return
    hub = facts.hub
    local = "folders and what has been downloaded before work; nothing new can be downloaded"
    if hub.offline:
        yield Check("hub", "warning", "turned off (HF_HUB_OFFLINE)", local, "unset HF_HUB_OFFLINE")
    elif hub.problem:
        yield Check("hub", "warning", f"{hub.address}: {hub.problem}", local, "check the connection, proxy and address")
    elif hub.refused:
        yield Check(
            "hub", "warning", f"{hub.address} refuses the token", "gated models cannot be downloaded", "hf auth login"
        )
    elif hub.user is None:
        yield Check("hub", "ok", f"{hub.address}, no token", "gated models need one", "hf auth login, if one is gated")
    else:
        yield Check("hub", "ok", f"{hub.address} as {hub.user}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# --------------------------------------------------------------------------- this machine


def this_machine() -> Readers:
    """The readers of the machine that this runs on."""
    return Readers(
        run=_run,
        device=mx.device_info,
        metal=mx.metal.is_available,
        system=lambda: (platform.system(), platform.machine(), platform.python_version()),
        version=version,
        cores=_cores,
        memory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        compiles=compiles,
        disk=_cache_disk,
        hub=_ask_hub,
    )


def _run(command: Sequence[str]) -> str:
    """Raises OSError or SubprocessError."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout


def _cores() -> int:
    count = os.cpu_count()
    if count is None:
        raise ValueError("the system does not say")
    return count


def _cache_disk() -> tuple[str, int]:
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return str(cache), shutil.disk_usage(there).free


def _ask_hub() -> Hub:
    address, token = constants.ENDPOINT, get_token()
    if constants.HF_HUB_OFFLINE:
        return Hub(address, True, None, None)
    try:
        if token is None:
            status = get_session().get(f"{address}/api/models?limit=1", timeout=SECONDS).status_code
            there = status < 400 or status == 404  # a mirror may have models and no list of them
            return Hub(address, False, None if there else f"answers with status {status}", None)
        return Hub(address, False, None, str(HfApi().whoami(token)["name"]))
    except HfHubHTTPError as error:
        status = error.response.status_code
        if token is not None and status in (401, 403):
            return Hub(address, False, None, None, refused=True)
        return Hub(address, False, f"answers with status {status}", None)
    except Exception as error:  # names, certificates, proxies: every layer has its own
        return Hub(address, False, f"does not answer ({(str(error) or type(error).__name__).splitlines()[0]})", None)
