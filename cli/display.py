"""What a person sees: streamed text with coloured drafts, progress, and the table of figures."""

import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from types import TracebackType

from rich import progress as bars
from rich.color import ColorSystem
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table

from mtp_mlx.generation import Origin
from mtp_mlx.loading import fetch
from mtp_mlx.stats import Stats

LONG_PROMPT = 512  # tokens from which reading a prompt is worth a progress bar
STYLES: dict[Origin, Style] = {
    "plain": Style(),
    "accepted": Style(color="green"),
    "copied": Style(color="cyan"),
    "correction": Style(color="red"),
    "bonus": Style(color="blue"),
}
PALE = Style(dim=True)
# What a model writes must not move a terminal's cursor, or do worse: control characters are shown by their pictures,
# those of the upper half, which have none, as what cannot be shown.
PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

_stderr = Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """One line for the user, beside the text."""
    _stderr.print(message, style="dim", markup=False, soft_wrap=True)


def versions() -> dict[str, str]:
    """Versions of what decides over a text, for a JSON object."""
    names = ("mtp-mlx", "mlx", "mlx-lm")
    return {name.replace("-", "_"): version(name) for name in names} | {"python": platform.python_version()}


class Notes(logging.Handler):
    """Holds what the package reports until it does not run into the streamed text."""

    def __init__(self, verbose: bool):
        super().__init__(logging.INFO if verbose else logging.WARNING)
        self._held: list[str] = []
        log = logging.getLogger("mtp_mlx")
        log.setLevel(self.level)
        log.handlers, log.propagate = [self], False

    def __enter__(self) -> "Notes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show()

    def emit(self, record: logging.LogRecord) -> None:
        self._held.append(record.getMessage())

    def show(self) -> None:
        for message in self._held:
            note(message)
        self._held.clear()


@contextmanager
def loading(model: str, drafter: str | None = None) -> Iterator[None]:
    """Shows that a model is being loaded, on a terminal. A download comes first: it has bars of its own."""
    fetch(model, drafter)
    with _stderr.status(escape(f"loading {model}")):
        yield


class PromptBar:
    """A bar while a long prompt is read; gone when the first token comes."""

    def __init__(self) -> None:
        self._bar = bars.Progress(
            bars.TextColumn("reading the prompt"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            console=_stderr,
            transient=True,
        )
        self._task: bars.TaskID | None = None

    def __enter__(self) -> "PromptBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        # Stopping a bar that never started would print an empty line.
        if self._task is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if total < LONG_PROMPT or not _stderr.is_terminal:
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)
        if done == total:
            self._stop()


class Transfer:
    """A bar while bytes are read or written, on a terminal; it appears with the first of them."""

    def __init__(self, doing: str) -> None:
        self._bar = bars.Progress(
            bars.TextColumn(escape(doing)),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TimeRemainingColumn(),
            console=_stderr,
            transient=True,
        )
        self._task: bars.TaskID | None = None

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if not _stderr.is_terminal:
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)


class Writer:
    """Streams text to stdout; in colour only where a terminal shows it, and there without control characters."""

    def __init__(self, show_drafts: bool):
        console = Console()
        self._harmless = sys.stdout.isatty()
        self._show_drafts = show_drafts
        self._coloured = console.color_system is not None and not console.no_color
        self._at_line_start = True

    def write(self, text: str, origin: Origin = "plain", *, pale: bool = False) -> None:
        if not text:
            return
        self._at_line_start = text.endswith("\n")
        if self._harmless:
            text = text.translate(PICTURES)
        if self._coloured and (pale or self._show_drafts):
            text = (PALE if pale else STYLES[origin]).render(text, color_system=ColorSystem.STANDARD)
        sys.stdout.write(text)
        sys.stdout.flush()

    def finish(self) -> None:
        """End the last line, so that a shell prompt does not follow the text."""
        if not self._at_line_start:
            sys.stdout.write("\n")
            sys.stdout.flush()


def stats_table(stats: Stats, ended: str | None, parts: Mapping[str, str], show_drafts: bool = False) -> None:
    """What was loaded, by part, and the figures of a generation and why it ended; on stderr."""
    if show_drafts:
        legend = "  ".join(f"[{style}]{name}[/]" for name, style in STYLES.items() if name != "plain")
        _stderr.print(f"\n{legend}")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is of no use without its end
    for name, value in (*parts.items(), *_rows(stats, ended)):
        table.add_row(name, escape(value))
    _stderr.print()
    _stderr.print(table)


def _rows(stats: Stats, ended: str | None) -> Iterator[tuple[str, str]]:
    memory = stats.memory
    cached = f" ({stats.cached_tokens} of them read before)" if stats.cached_tokens else ""
    yield "prompt", f"{stats.prompt_tokens} tokens{cached}, {stats.prompt_tps:.1f} tok/s"
    yield "generated", f"{stats.generation_tokens} tokens, {stats.generation_tps:.1f} tok/s ({ended})"
    yield "first token", f"{stats.ttft_seconds:.3f} s"
    built = "" if stats.compiled else "; built anew each time, as no compiler was found"
    yield "rounds", f"{stats.rounds}, {stats.tokens_per_round:.2f} tokens per round{built}"
    yield "depth", f"{stats.depth}: {stats.depth_reason}"
    if stats.drafted:
        shares = " ".join(f"{share:.0%}" for share in stats.accepted_per_position)
        own = stats.drafted - stats.copied
        if own:
            yield "accepted", f"{stats.accepted - stats.copied_accepted} of {own} drafts; per position {shares}"
        if stats.copied:
            yield "copied", f"{stats.copied_accepted} of {stats.copied} tokens of earlier text kept"
    phases = [
        ("commit", stats.commit.ms),
        ("draft", stats.draft.ms),
        ("verify", stats.verify.ms),
        ("host", stats.host.ms),
    ]
    yield (
        "per round",
        ", ".join(f"{name} {ms:.1f} ms" for name, ms in phases if ms is not None) or "too few rounds",
    )
    yield (
        "memory",
        f"target {size(memory.target)}, drafter {size(memory.drafter)}, cache {size(memory.cache)}, "
        f"peak {size(memory.peak)}",
    )


def size(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
