"""The tokenizer of the demo models: byte-level BPE with 4096 ids, and the corpus as ids."""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bench.demo.corpus import Document, load_corpus

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD, EOS, BOS, UNK = range(4)
SIZE = 4096


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Train on the training files only; every byte has an id, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents if not d.heldout), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers and mlx-lm read them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_ids(tokenizer: Tokenizer, documents: list[Document], out: Path) -> None:
    """Write each split as one stream of uint16: <bos> document <eos>, documents in a fixed shuffled order."""
    order = np.random.default_rng(0).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    for split, heldout in (("train", False), ("heldout", True)):
        texts = [d.text for d in shuffled if d.heldout == heldout]
        encoded = tokenizer.encode_batch(texts)  # begins with <bos>
        stream = np.concatenate([np.array([*e.ids, EOS], np.uint16) for e in encoded])
        np.save(out / f"{split}.npy", stream)
        characters = sum(map(len, texts))
        print(f"{split}: {len(stream)} tokens, {characters / len(stream):.3f} characters per token")
        (out / f"{split}.json").write_text(
            json.dumps({"tokens": len(stream), "characters": characters, "files": len(texts)}) + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of corpus.jsonl")
    args = parser.parse_args()
    documents = load_corpus(args.out)
    tokenizer = train_tokenizer(documents)
    write_tokenizer(tokenizer, args.out / "tokenizer")
    write_ids(tokenizer, documents, args.out)


if __name__ == "__main__":
    main()
