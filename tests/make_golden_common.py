"""What the golden fixtures of every family share: token lists, greedy continuations, files, a tokenizer."""

# mypy: ignore-errors
# torch and transformers are not installed where mypy runs.

import argparse
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel

VOCAB, HIDDEN, HEADS = 320, 64, 4
DRAFTS, CONTINUATION = 4, 24
PROMPTS = (12, 30)
END_TOKENS = (1, 319)  # <eos> and <turn|>, as the released generation_config lists two
MARGIN = 5e-3  # in a logit, well above the float32 noise between two backends
ROUTING_MARGIN = 1e-4  # in a probability; there are too many routings to ask for more

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]

# --------------------------------------------------------------------------- models


def class_of(name: str) -> Any:
    return getattr(transformers, name)


def finish(
    network: Any, config: Any, draw: Callable[[str, torch.Tensor, torch.Generator], torch.Tensor], seed: torch.Generator
) -> PreTrainedModel:
    """An eager float32 model whose every weight was drawn by `draw`."""
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = network(config).eval()
    with torch.no_grad():
        for name, weight in stored_weights(model):
            weight.copy_(draw(name, weight, seed))
    return model


def stored_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and the buffers a checkpoint holds, sorted, a tied head once."""
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return ((name, state[name]) for name in sorted(state) if name not in tied)


# --------------------------------------------------------------------------- golden values


class Scores(Protocol):
    """What a target computes along a token list."""

    @property
    def logits(self) -> torch.Tensor: ...  # (T, V)

    @property
    def routing_margin(self) -> float: ...  # of its narrowest choice of experts


def margin(scores: torch.Tensor, rank: int = 1) -> float:
    """Least distance between the last chosen score and the first one left, over all rows."""
    best = scores.topk(rank + 1, dim=-1).values
    return float((best[..., rank - 1] - best[..., rank]).min())


def random_tokens(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (length,), generator=generator)
    ids[0] = 2
    return ids


def greedy(run: Callable[[torch.Tensor], Scores], prompt: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """CONTINUATION tokens without a cache, and whether none of the choices behind them was a near-tie."""
    tokens, clear = prompt, True
    for _ in range(CONTINUATION):
        scores = run(tokens)
        tokens = torch.cat([tokens, scores.logits[-1:].argmax(-1)])
        clear = clear and margin(scores.logits[-1:]) > MARGIN and scores.routing_margin > ROUTING_MARGIN
    return tokens[len(prompt) :], clear


def golden_greedy(run: Callable[[torch.Tensor], Scores], length: int) -> Arrays:
    """The first random prompt whose continuation is clear, varied and free of end tokens."""
    for seed in itertools.count(length):
        prompt = random_tokens(length, seed)
        tokens, clear = greedy(run, prompt)
        distinct = set(tokens.tolist())
        if clear and len(distinct) >= CONTINUATION // 3 and not distinct & set(END_TOKENS):
            return {f"prompt_{length}": ints(prompt), f"greedy_{length}": ints(tokens)}
    raise AssertionError("unreachable")


def ints(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.int32)


def floats(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.float32
    return tensor.numpy()


def merge(parts: Iterable[Arrays]) -> Arrays:
    return {name: array for part in parts for name, array in part.items()}


# --------------------------------------------------------------------------- files


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_generation_config(folder: Path, top_k: int) -> None:
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 2, "do_sample": True, "eos_token_id": list(END_TOKENS), "pad_token_id": 0}
        | {"temperature": 1.0, "top_k": top_k, "top_p": 0.95},
    )


def write_weights(folder: Path, shards: Sequence[Tensors]) -> None:
    """One file, or several and their index."""
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for part in shards for tensor in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def dealt(tensors: Tensors, shards: int) -> list[Tensors]:
    """The tensors in turn to so many shards: layers straddle them."""
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[shard::shards]} for shard in range(shards)]


# --------------------------------------------------------------------------- tokenizer

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]
TURNS = ["<|turn>", "<turn|>"]  # the last two ids, 318 and 319
TRAINING_TEXT = """
A small model drafts several tokens and the large model verifies them together. Where the two agree, the draft
is kept; at the first place where they differ, the large model's own token stands, and the rest of the draft
is dropped. The text that comes out is the text the large model would have written alone, only sooner.
"""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + message['role'] + '\\n' + message['content'] + '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE: every text has ids, every id has a text, and VOCAB ids in all."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(TURNS),
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.add_special_tokens(TURNS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    assert tokenizer.get_vocab_size() == VOCAB and tokenizer.token_to_id(TURNS[-1]) == END_TOKENS[-1]
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name.strip('<>')}_token": name for name in SPECIALS}
    write_json(
        folder / "tokenizer_config.json",
        named
        | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
        | {"clean_up_tokenization_spaces": False, "model_max_length": 1024},
    )


# --------------------------------------------------------------------------- reading everything back


def reload(folder: Path, like: PreTrainedModel, stubs: set[str]) -> PreTrainedModel:
    model, info = type(like).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert set(info["unexpected_keys"]) == stubs and not info["missing_keys"] and not info["mismatched_keys"]
    return model.eval()


def mlx_lm_error(folder: Path, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    import mlx.core as mx
    import mlx_lm

    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    theirs = np.array(model(mx.array(tokens.numpy())[None])[0])
    return float(np.abs(theirs - logits.numpy()).max())


def print_sizes(folder: Path, remark: str) -> None:
    sizes = {file.relative_to(folder): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    print(f"{folder.name:20} {sum(sizes.values()) / 1e3:7.0f} kB  {remark}")
    for name, size in sizes.items():
        print(f"    {size / 1e3:8.1f} kB  {name}")


def write_all(
    variants: dict[str, Any], write_variant: Callable[[Path, Any, torch.Generator], None], description: str
) -> None:
    """The command line: every variant, or those of --only."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fixtures")
    parser.add_argument("--only", choices=variants, nargs="*", default=list(variants))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in arguments.only:
        folder = arguments.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # Each variant has its own stream, so that a change in one leaves the others as they are.
        write_variant(folder, variants[name], torch.Generator().manual_seed(list(variants).index(name)))
