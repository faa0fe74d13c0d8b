"""Write a model card: the text of card.md or qwen_card.md with the figures that the other scripts left."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from bench.demo import assistant, mtp
from bench.demo.drafter import TEMPERATURE, tokens_read
from bench.demo.families import family_argument
from bench.demo.gemma import ASSISTANT, TARGET, Assistant, Target
from bench.demo.qwen import LINEAR, SIZES, Head
from bench.demo.qwen import Target as QwenTarget
from bench.demo.target import ROWS
from bench.demo.training import LENGTH, parameter_count


def pattern(layers: tuple[str, ...]) -> str:
    return "".join(kind[0].upper() for kind in layers)


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def table(rows: dict[str, list[float]]) -> str:
    return "\n".join(f"| {name} | " + " | ".join(f"{x:.2f}" for x in row) + " |" for name, row in rows.items())


def corpus_table(rows: list[dict[str, Any]]) -> str:
    keys = ("package", "version", "licence", "kind", "files", "train_bytes", "heldout_files", "heldout_bytes")
    cells = [[f"{row[k]:,}" if isinstance(row[k], int) else row[k] for k in keys] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def bits(nats: float, split: Path) -> float:
    """Nats per token as bits per character of a split."""
    counts = json.loads(split.read_text())
    return nats * counts["tokens"] / counts["characters"] / math.log(2)


def figures(out: Path, drafter: str, own: int, corpus: int) -> dict[str, Any]:
    """What both cards mention; the drafter by its folder and the lengths of its rows."""
    target_log, drafter_log = log(out / "target"), log(out / drafter)
    losses = [row["loss"] for row in target_log if "loss" in row][-4:]
    train_loss, heldout_loss = sum(losses) / len(losses), target_log[-1]["heldout"]
    acceptance = json.loads((out / "acceptance.json").read_text())
    written = json.loads((out / "continuations.json").read_text())
    return {
        "corpus": corpus_table(json.loads((out / "corpus.json").read_text())),
        "length": LENGTH,
        "sharpness": TEMPERATURE,
        "target_steps": target_log[-1]["step"],
        "target_tokens": target_log[-1]["step"] * ROWS * LENGTH,
        "target_minutes": round(target_log[-1]["seconds"] / 60),
        "own_tokens": written["rows"] * written["length"],
        "own_minutes": round(written["seconds"] / 60),
        "drafter_steps": drafter_log[-1]["step"],
        "drafter_tokens": tokens_read(int(drafter_log[-1]["step"]), own, corpus),
        "drafter_minutes": round(drafter_log[-1]["seconds"] / 60),
        "train_loss": train_loss,
        "train_bits": bits(train_loss, out / "train.json"),
        "heldout_loss": heldout_loss,
        "heldout_bits": bits(heldout_loss, out / "heldout.json"),
        "prompts": acceptance["all"]["prompts"],
        "rounds": table({name: list(row["tokens_per_round"].values()) for name, row in acceptance.items()}),
        "acceptance": table({name: row["acceptance"] for name, row in acceptance.items()}),
    }


def gemma_figures(out: Path) -> dict[str, Any]:
    parameters = parameter_count(Target())
    return {
        **figures(out, "assistant", assistant.OWN, assistant.CORPUS),
        "target": TARGET,
        "assistant": ASSISTANT,
        "target_millions": round(parameters / 1e6),
        "target_parameters": parameters,
        "assistant_parameters": parameter_count(Assistant()),
        "target_layers": pattern(TARGET.layers),
        "assistant_layers": pattern(ASSISTANT.layers),
        "unrolled": assistant.UNROLLED,
    }


def qwen_figures(out: Path) -> dict[str, Any]:
    parameters = parameter_count(QwenTarget())
    return {
        **figures(out, "head", mtp.LENGTH, mtp.LENGTH),
        "sizes": SIZES,
        "target_millions": round(parameters / 1e6),
        "target_parameters": parameters,
        "head_parameters": parameter_count(Head()),
        "layers": pattern(SIZES.layers),
        "linear_layers": SIZES.layers.count(LINEAR),
        "unrolled": mtp.UNROLLED,
        "row": mtp.LENGTH,
    }


CARDS = {"gemma": ("card.md", gemma_figures), "qwen": ("qwen_card.md", qwen_figures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained models")
    parser.add_argument("--to", type=Path, required=True, help="folder of the checkpoints")
    family_argument(parser)
    args = parser.parse_args()
    name, values = CARDS[args.family]
    template = (Path(__file__).parent / name).read_text()
    (args.to / "README.md").write_text(template.format(**values(args.out)))


if __name__ == "__main__":
    main()
