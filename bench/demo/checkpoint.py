"""Write the trained pair as Hugging Face checkpoints in the released layout, and prove them readable."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.demo.gemma import (
    ASSISTANT,
    FULL,
    SLIDING,
    TARGET,
    Assistant,
    Sizes,
    Target,
    draft_masks,
    initialise,
    ropes_at,
    target_masks,
)
from bench.demo.training import load_model

IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def text_config(sizes: Sizes) -> dict[str, Any]:
    """The nested config, with the flat keys of released files and their inert ones."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        **IDS,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "final_logit_softcapping": sizes.softcap,
        "global_head_dim": sizes.global_head,
        "head_dim": sizes.head,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": sizes.width,
        "hidden_size_per_layer_input": sizes.ple,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "layer_types": list(sizes.layers),
        "max_position_embeddings": 2048,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_attention_heads": sizes.heads,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": len(sizes.layers),
        "num_key_value_heads": 1,
        "num_kv_shared_layers": sizes.shared,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": sizes.window,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": sizes.vocab,
        "vocab_size_per_layer_input": sizes.vocab if sizes.ple else 0,
    }


def target_config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        **IDS,
        "dtype": "bfloat16",
        "model_type": "gemma4",
        "text_config": text_config(TARGET),
        "tie_word_embeddings": True,
        "transformers_version": "5.22.2",
        "vision_config": None,
        "vocab_size": TARGET.vocab,
    }


def assistant_config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": TARGET.width,
        **IDS,
        "centroid_intermediate_top_k": 32,
        "dtype": "bfloat16",
        "model_type": "gemma4_assistant",
        "num_centroids": 2048,
        "text_config": text_config(ASSISTANT),
        "tie_word_embeddings": True,
        "transformers_version": "5.22.2",
        "use_ordered_embeddings": False,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(models: dict[str, nn.Module], path: Path) -> None:
    """Write models in one file, their names after the prefixes given."""
    weights = {
        prefix + name: w.detach().bfloat16().contiguous()
        for prefix, model in models.items()
        for name, w in model.state_dict().items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def copy_tokenizer(folder: Path, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, out / name)


def write_pair(target: Target, assistant: Assistant, tokenizer: Path, out: Path) -> None:
    """Write both checkpoints: the target to `out`, the assistant to `out/assistant`."""
    (out / "assistant").mkdir(parents=True, exist_ok=True)
    generation = {**IDS, "do_sample": False, "transformers_version": "5.22.2"}
    write_json(out / "config.json", target_config())
    write_json(out / "generation_config.json", generation)
    write_weights({"model.language_model.": target}, out / "model.safetensors")
    copy_tokenizer(tokenizer, out)
    write_json(out / "assistant" / "config.json", assistant_config())
    write_json(out / "assistant" / "generation_config.json", {**generation, "num_assistant_tokens": 4})
    write_weights({"": assistant}, out / "assistant" / "model.safetensors")


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def check_target(target: Target, out: Path, ids: Tensor) -> None:
    """Compare with transformers' own class in fp32: logits, hidden and the K/V that the assistant reads."""
    from transformers import Gemma4ForConditionalGeneration

    theirs, report = Gemma4ForConditionalGeneration.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    output = theirs.eval()(ids, output_hidden_states=True, return_shared_kv_states=True)
    length = ids.shape[1]
    hidden, kv = target(ids, ropes_at(torch.arange(length), TARGET), target_masks(length, TARGET.window))
    logits = target.head(hidden)
    print("target against transformers, max abs difference of logits:", difference(logits, output.logits))
    assert difference(logits, output.logits) < 1e-4
    assert difference(hidden, output.hidden_states[-1]) < 1e-4
    for kind, pair in output.shared_kv_states.items():
        assert max(difference(a, b) for a, b in zip(kv[kind], pair, strict=True)) < 1e-4, kind


@torch.no_grad()
def check_assistant(target: Target, assistant: Assistant, out: Path, ids: Tensor) -> None:
    """Compare one round of four drafts at the last position with transformers' own class in fp32."""
    from transformers import Gemma4AssistantForCausalLM

    theirs, report = Gemma4AssistantForCausalLM.from_pretrained(
        out / "assistant", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    length = ids.shape[1]
    P = length - 1
    hidden, kv = target(ids, ropes_at(torch.arange(length), TARGET), target_masks(length, TARGET.window))
    masks = {k: m[-1:] for k, m in draft_masks(1, length, ASSISTANT.window).items()}
    ropes = ropes_at(torch.arange(P, length), ASSISTANT)
    # Exactly the visible keys, so that transformers' wider window (W+1) cannot matter.
    start = {SLIDING: max(0, P - TARGET.window), FULL: 0}
    seen = {kind: tuple(t[:, :, start[kind] : P] for t in pair) for kind, pair in kv.items()}
    token, h, h_theirs, worst = ids[:, P:], hidden[:, P - 1 : P], hidden[:, P - 1 : P], 0.0
    for _ in range(4):
        logits, h = assistant(target.embed(token), h, ropes, kv, masks)
        output = theirs.eval()(
            inputs_embeds=torch.cat([target.embed(token), h_theirs], -1),
            position_ids=torch.tensor([[P]]),
            shared_kv_states=seen,
        )
        h_theirs = output.last_hidden_state
        worst = max(worst, difference(logits, output.logits), difference(h, h_theirs))
        token = logits.argmax(-1)
    print("assistant against transformers, max abs difference of logits and hidden:", worst)
    assert worst < 1e-3  # rounding grows from step to step


def check_mlx(logits: Callable[[Tensor], Tensor], out: Path) -> None:
    """Let mlx-lm load the target, compare its logits of ids (1, L) and show what it writes."""
    import mlx.core as mx
    from mlx_lm import generate, load

    model, tokenizer = load(str(out))
    model.set_dtype(mx.float32)
    text = 'def read_lines(path):\n    """Return the lines of a file."""'
    ids = torch.tensor([tokenizer.encode(text)])
    theirs = torch.tensor(model(mx.array(ids.numpy())).tolist())
    print("target against mlx-lm, max abs difference of logits:", difference(logits(ids), theirs))
    assert difference(logits(ids), theirs) < 1e-3
    print(text + generate(model, tokenizer, text, max_tokens=120))


def check_tokenizer(out: Path) -> None:
    """Any text, whatever its bytes, comes back from the ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    for text in ("def f():\n\treturn '\\x00'  # ok\r\n\n\n", "Grüße, 世界! \x00\x7f\ufffd", " .  ,  n't"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained models")
    parser.add_argument("--to", type=Path, required=True, help="folder to write the checkpoints to")
    args = parser.parse_args()
    target, assistant = Target(), Assistant()
    load_model(target, args.out / "target")
    initialise(assistant, seed=1)
    if (args.out / "assistant").exists():
        load_model(assistant, args.out / "assistant")
    assistant.load_state_dict({n: w.bfloat16().float() for n, w in assistant.state_dict().items()})
    write_pair(target, assistant, args.out / "tokenizer", args.to)
    ids = torch.randint(4, TARGET.vocab, (1, 300), generator=torch.Generator().manual_seed(0))
    check_target(target, args.to, ids)
    check_assistant(target, assistant, args.to, ids)
    check_tokenizer(args.to)

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        L = ids.shape[1]
        hidden, _ = target(ids, ropes_at(torch.arange(L), TARGET), target_masks(L, TARGET.window))
        return target.head(hidden)

    check_mlx(logits, args.to)


if __name__ == "__main__":
    main()
