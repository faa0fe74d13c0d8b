"""Choose the held-out prompts of heldout.json: pieces of files that no demo model was trained on."""

import argparse
import json
import random
from pathlib import Path

from tokenizers import Tokenizer

from bench.demo.corpus import Document, load_corpus

TOKENS = ((20, 80), (100, 180), (300, 450))
EACH = 8  # prompts of every length, of code and of text


def piece(text: str, tokenizer: Tokenizer, low: int, high: int, choice: random.Random) -> str | None:
    """Whole lines from a random line on, low to high tokens; None where the lines do not fit."""
    start = text.rfind("\n", 0, choice.randrange(len(text))) + 1
    wanted, prompt = choice.randint(low, high), ""
    for line in text[start:].splitlines(keepends=True):
        if len(tokenizer.encode(prompt + line).ids) > wanted:
            break
        prompt += line
    prompt = prompt.rstrip()  # a token may span a newline and the next line's indentation
    return prompt if len(tokenizer.encode(prompt).ids) >= low else None


def prompts(files: list[Document], tokenizer: Tokenizer, choice: random.Random) -> list[dict[str, str | int]]:
    """EACH prompts of every length; files in turn, so that no long one dominates."""
    chosen: list[dict[str, str | int]] = []
    turn = 0
    for number, (low, high) in enumerate(TOKENS, start=1):
        while len(chosen) < EACH * number:
            document = files[turn % len(files)]
            turn += 1
            text = piece(document.text, tokenizer, low, high, choice)
            if text is not None:
                source = f"{document.package}/{document.path}"
                tokens = len(tokenizer.encode(text).ids)
                chosen.append({"source": source, "kind": document.kind, "tokens": tokens, "text": text})
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer" / "tokenizer.json"))
    documents = [d for d in load_corpus(args.out) if d.heldout]
    choice, chosen = random.Random(0), []
    for kind in ("code", "text"):
        files = [d for d in documents if d.kind == kind]
        choice.shuffle(files)
        chosen += prompts(files, tokenizer, choice)
    path = Path(__file__).parent / "heldout.json"
    path.write_text(json.dumps(chosen, indent=1) + "\n")
    print(f"{len(chosen)} prompts, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
