"""`mtp-mlx doctor`: what this machine has for drafting, what it lacks, and what to do."""

import json
from typing import Annotated

import typer
from rich.console import Console

from mtp_mlx.cli.display import versions
from mtp_mlx.doctor import Check, can_run, examine, figures, this_machine

_STYLES = {"ok": "green", "warning": "yellow", "problem": "red", "unknown": "dim"}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the report.")] = False,
) -> None:
    """Examine this machine: chip, memory, system, libraries, disk and hub, and what each means for drafting.

    Exits with 1 if something keeps drafting from working. Example: mtp-mlx doctor
    """
    with Console(stderr=True).status("examining this machine"):
        checks = examine(this_machine())
    if as_json:
        typer.echo(json.dumps({**figures(checks), "versions": versions()}))
    else:
        show(checks)
    if not can_run(checks):
        raise typer.Exit(1)


def show(checks: list[Check]) -> None:
    """The report: a line for each finding, what it means and what to do below."""
    console = Console(highlight=False)
    width = max(len(check.name) for check in checks)
    for check in checks:
        console.print(f"{check.status:<8}", style=_STYLES[check.status], end="")
        console.print(f" {check.name:<{width}}  {check.found}", markup=False, soft_wrap=True)
        for line in (check.means, check.remedy and f"-> {check.remedy}"):
            if line:
                console.print(f"{'':{width + 11}}{line}", style="dim", markup=False, soft_wrap=True)
    warnings = sum(check.status == "warning" for check in checks)
    told = f", with {warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
    verdict = (
        f"Drafting works here{told}." if can_run(checks) else "Drafting does not work here; see the problems above."
    )
    console.print(f"\n{verdict}", markup=False, soft_wrap=True)
