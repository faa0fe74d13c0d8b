"""Write the Qwen target and its head as one Hugging Face checkpoint in the released layout, and prove it readable.

The layout is that of the released models, which read images too, without their vision tower.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.demo.checkpoint import (
    IDS,
    check_mlx,
    check_tokenizer,
    copy_tokenizer,
    difference,
    write_json,
    write_weights,
)
from bench.demo.families import QWEN
from bench.demo.qwen import FULL, SIZES, Head, Past, Sizes, Target, additive, causal, causal_mask, rope_table
from bench.demo.training import load_model


def text_config(sizes: Sizes) -> dict[str, Any]:
    """The nested config, with the keys of released files."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        **IDS,
        "dtype": "bfloat16",
        "full_attention_interval": sizes.layers.index(FULL) + 1,
        "head_dim": sizes.head,
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "layer_types": list(sizes.layers),
        "linear_conv_kernel_dim": sizes.kernel,
        "linear_key_head_dim": sizes.linear_head,
        "linear_num_key_heads": sizes.linear_k_heads,
        "linear_num_value_heads": sizes.linear_v_heads,
        "linear_value_head_dim": sizes.linear_head,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 2048,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": len(sizes.layers),
        "num_key_value_heads": sizes.kv_heads,
        "partial_rotary_factor": sizes.turned / sizes.head,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],  # for text the three are equal
            "partial_rotary_factor": sizes.turned / sizes.head,
            "rope_theta": sizes.theta,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": sizes.vocab,
    }


def config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        **IDS,
        "dtype": "bfloat16",
        "model_type": "qwen3_5",
        "text_config": text_config(SIZES),
        "tie_word_embeddings": True,
        "transformers_version": "5.22.2",
    }


def write(target: Target, head: Head, tokenizer: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config())
    write_json(out / "generation_config.json", {**IDS, "do_sample": False, "transformers_version": "5.22.2"})
    write_weights({"model.language_model.": target, "mtp.": head}, out / "model.safetensors")
    copy_tokenizer(tokenizer, out)


def read(target: Target, ids: Tensor) -> Tensor:
    """Post-norm hidden (B, L, D)."""
    L = ids.shape[1]
    return target(ids, rope_table(torch.arange(L)), causal_mask(L))


@torch.no_grad()
def check_steps(target: Target, ids: Tensor) -> None:
    """The rule by chunks, which training used, against the plain recurrence of token by token."""
    past, steps = Past(ids.shape[1]), []
    for i, token in enumerate(ids.T):
        steps.append(target(token[None], rope_table(torch.arange(i, i + 1)), past.masks(1), past))
    worst = difference(torch.cat(steps, 1), read(target, ids))
    print("chunks against steps, max abs difference of hidden:", worst)
    assert worst < 1e-3


@torch.no_grad()
def check_target(target: Target, out: Path, ids: Tensor) -> None:
    """Compare with transformers' own class in fp32: logits and hidden."""
    from transformers import Qwen3_5ForCausalLM

    theirs, report = Qwen3_5ForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    output = theirs.eval()(ids, output_hidden_states=True)
    hidden = read(target, ids)
    worst = difference(target.head(hidden), output.logits)
    print("target against transformers, max abs difference of logits:", worst)
    assert max(worst, difference(hidden, output.hidden_states[-1])) < 1e-3


@torch.no_grad()
def check_head(target: Target, head: Head, out: Path, ids: Tensor) -> None:
    """Compare one round of four drafts after ids with transformers' decoder layer, given the head's file.

    transformers has no such head, but it is one more text model: of one layer, over mixed pairs.
    """
    from transformers import Qwen3_5TextConfig, Qwen3_5TextModel

    weights = {n.removeprefix("mtp."): w for n, w in load_file(out / "model.safetensors").items() if n[:4] == "mtp."}
    assert len(weights) == 15, sorted(weights)
    one = Qwen3_5TextConfig(**{**text_config(SIZES), "num_hidden_layers": 1, "layer_types": [FULL], "dtype": "float32"})
    theirs = Qwen3_5TextModel(one).eval()
    layer = {n: w for n, w in weights.items() if n.startswith(("layers.", "norm."))}
    missing, unexpected = theirs.load_state_dict(layer, strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected, (missing, unexpected)

    def mixed(embedded: Tensor, h: Tensor) -> Tensor:
        norms = (weights[f"pre_fc_norm_{part}.weight"].float() for part in ("embedding", "hidden"))
        parts = [
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + w)
            for x, w in zip((embedded, h), norms, strict=True)
        ]
        return torch.cat(parts, -1) @ weights["fc.weight"].float().T

    hidden, L = read(target, ids)[:, :-1], ids.shape[1] - 1  # the target has not read the last token
    embedded = target.embed(ids[:, 1:])
    pairs_theirs = mixed(embedded, hidden)
    h, pairs, drafted = head(embedded, hidden, rope_table(torch.arange(L)), causal_mask(L), None, ())
    h, mask, worst = h[:, -1:], additive(causal(L)[-1:]), 0.0
    for s in range(1, 5):
        h_theirs = theirs(inputs_embeds=pairs_theirs, use_cache=False).last_hidden_state[:, -1:]
        logits = target.head(h)
        worst = max(worst, difference(h, h_theirs), difference(logits, target.head(h_theirs)))
        embedded = target.embed(logits.argmax(-1))
        pairs_theirs = torch.cat([pairs_theirs, mixed(embedded, h_theirs)], 1)
        rope = rope_table(torch.arange(L - 1 + s, L + s))
        h, pairs, drafted = head(embedded, h, rope, mask, pairs, drafted)
    print("head against transformers' layer, max abs difference of logits and hidden:", worst)
    assert worst < 1e-3  # rounding grows from step to step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained models")
    parser.add_argument("--to", type=Path, required=True, help="folder to write the checkpoint to")
    args = parser.parse_args()
    target, head = QWEN.load_target(args.out), load_model(Head(), args.out / "head", QWEN.rounded)
    write(target, head, args.out / "tokenizer", args.to)
    ids = torch.randint(4, SIZES.vocab, (1, 300), generator=torch.Generator().manual_seed(0))
    check_steps(target, ids)
    check_target(target, args.to, ids)
    check_head(target, head, args.to, ids)
    check_tokenizer(args.to)
    check_mlx(lambda ids: target.head(read(target, ids)), args.to)


if __name__ == "__main__":
    main()
