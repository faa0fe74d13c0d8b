"""Writes tests/fixtures: tiny Qwen checkpoints with an MTP head and what torch and transformers compute from them.

    python tests/make_golden_qwen.py [--out tests/fixtures] [--only qwen3_5_tied ...]

Run by hand, never by CI. Needs torch, transformers 5.22.2, tokenizers and mlx-lm. Everything follows from the
seeds below; a second run on the same machine writes the same bytes.

Each folder is a checkpoint as released: config.json with a nested text_config (qwen3_next: flat),
generation_config.json, a byte-level tokenizer, and tensors in the raw layout: zero-centred norms, conv1d as
[C, 1, 4], A_log in float32 and all else in bfloat16, the head as mtp.*. Transformers knows no MTP head of Qwen:
`Head` builds one of its layers after vLLM's qwen3_next_mtp.py and qwen3_5_mtp.py. The golden values are computed
in float32 from the rounded weights.

    qwen3_5_dense        untied, 8 layers
    qwen3_5_tied         tied, 4 layers
    qwen3_5_moe          experts fused in trunk and head
    qwen3_5_moe_sharded  fused in the trunk, one by one in the head; three shards, the head in two of them;
                         stub vision tensors
    qwen3_next           experts one by one; in_proj_qkvz and in_proj_ba, interleaved per key head

The dense ones have 3 linear layers to a full one, those with experts 1 (to stay small): full_attention_interval.

golden.npz, float32 and int32. T = 48 tokens, V = 320 vocabulary, H = 64 hidden, L layers, k = 4 drafts,
n = 4 draft rounds:

    tokens          (T,)       random ids; all but the greedy arrays is teacher-forced along them
    logits          (T, V)     target
    hidden          (T, H)     target, AFTER the final norm: what the head is given
    prenorm         (T, H)     target, before the final norm
    layer_positions (6,)       positions at which layer_inputs are kept
    layer_inputs    (L, 6, H)  residual stream as it enters each layer; entry 0 is the embedding
    prompt_{12,30}  (12,) (30,)
    greedy_{12,30}  (24,)      their greedy continuations without a cache; none contains an end token
    mtp_keys, mtp_values  (2, T-1, 32)
                               the head's cache after all pairs of the list, keys after norm and RoPE. Pair t is
                               tokens[t+1] with hidden[t], it stands at position t and predicts tokens[t+2]
    draft_bonus     (n,)       P, the index of the bonus token in each draft round

Draft rounds, for a tag in {mtp, mtp_prenorm}. The head has seen the pairs 0..P-1, so the last of them holds the
bonus tokens[P]. It gives the first draft; each later one comes from the draft before it with that one's hidden:

    {tag}_tokens  (n, k)     drafts
    {tag}_logits  (n, k, V)
    {tag}_hidden  (n, k, H)  after mtp.norm, fed to the next draft

mtp_prenorm is the negative control: all pairs with `prenorm` instead of `hidden`, which is wrong.

No greedy token, draft or choice of experts is a near-tie, and decoding with a cache gives the same logits: see
MARGIN, ROUTING_MARGIN, AGREEMENT.
"""

# mypy: ignore-errors
# torch and transformers are not installed where mypy runs.

import copy
import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from make_golden_common import (
    DRAFTS,
    HEADS,
    HIDDEN,
    MARGIN,
    PROMPTS,
    ROUTING_MARGIN,
    VOCAB,
    Arrays,
    Tensors,
    class_of,
    dealt,
    finish,
    floats,
    golden_greedy,
    ints,
    margin,
    merge,
    mlx_lm_error,
    print_sizes,
    random_tokens,
    reload,
    write_all,
    write_generation_config,
    write_json,
    write_tokenizer,
    write_weights,
)
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

LENGTH = 48
BONUS = (12, 13, 17, LENGTH - 1)
KEPT_POSITIONS = (0, 1, 3, 4, 20, 47)  # around the width of the convolution, and far above it
AGREEMENT = 1e-4  # in a logit, between the two ways transformers computes a linear layer
LINEAR, FULL = "linear_attention", "full_attention"

# --------------------------------------------------------------------------- variants

ROPE = {
    "rope_type": "default",
    "rope_theta": 10_000_000.0,
    "partial_rotary_factor": 0.25,
    "mrope_interleaved": True,
    "mrope_section": [2, 1, 1],
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
DENSE = {"intermediate_size": 96}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
# Keys of the released configs which transformers does not write.
RELEASED_3_5 = {
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "output_gate_type": "swish",
    "partial_rotary_factor": 0.25,
}
RELEASED_NEXT = {"partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": 10_000_000}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN}
VISION_STUBS = ("model.visual.blocks.0.attn.qkv.weight", "model.visual.patch_embed.proj.weight")


@dataclass(frozen=True)
class Family:
    """Where transformers keeps the parts of one architecture."""

    name: str  # class prefix
    modeling: Any
    nested: bool = True  # text_config inside the config, model.language_model.* in the file


@dataclass(frozen=True)
class Variant:
    """One checkpoint."""

    family: Family
    layers: int
    interval: int  # every so many layers one has full attention
    mlp: dict[str, Any]
    tied: bool = False
    split_trunk: bool = False  # one tensor per expert
    split_head: bool = False
    shards: int = 1
    stubs: tuple[str, ...] = ()


QWEN3_5 = Family("Qwen3_5", modeling_qwen3_5)
QWEN3_5_MOE = Family("Qwen3_5Moe", modeling_qwen3_5_moe)
QWEN3_NEXT = Family("Qwen3Next", modeling_qwen3_next, nested=False)

VARIANTS = {
    "qwen3_5_dense": Variant(QWEN3_5, 8, 4, DENSE),
    "qwen3_5_tied": Variant(QWEN3_5, 4, 4, DENSE, tied=True),
    "qwen3_5_moe": Variant(QWEN3_5_MOE, 2, 2, EXPERTS),
    "qwen3_5_moe_sharded": Variant(QWEN3_5_MOE, 2, 2, EXPERTS, split_head=True, shards=3, stubs=VISION_STUBS),
    "qwen3_next": Variant(QWEN3_NEXT, 2, 2, DENSE | EXPERTS, split_trunk=True, split_head=True),
}

# --------------------------------------------------------------------------- models


def text_config(variant: Variant) -> Any:
    types = [FULL if (i + 1) % variant.interval == 0 else LINEAR for i in range(variant.layers)]
    name = f"{variant.family.name}TextConfig" if variant.family.nested else f"{variant.family.name}Config"
    return class_of(name)(
        **COMMON,
        **variant.mlp,
        rope_parameters=dict(ROPE),
        num_hidden_layers=variant.layers,
        layer_types=types,
        tie_word_embeddings=variant.tied,
    )


def build_target(variant: Variant, generator: torch.Generator) -> PreTrainedModel:
    return finish(class_of(f"{variant.family.name}ForCausalLM"), text_config(variant), draw, generator)


class Head(nn.Module):
    """One MTP layer. Embedding, rotary table and output head are the target's."""

    def __init__(self, target: PreTrainedModel, family: Family):
        super().__init__()
        self.config = copy.deepcopy(target.config)
        self.config.num_hidden_layers, self.config.layer_types = 1, [FULL]
        layer, norm = (getattr(family.modeling, f"{family.name}{part}") for part in ("DecoderLayer", "RMSNorm"))
        self.fc = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            norm(HIDDEN, eps=self.config.rms_norm_eps) for _ in range(3)
        )
        self.layers = nn.ModuleList([layer(self.config, 0)])

    def forward(
        self,
        target: PreTrainedModel,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        cache: DynamicCache,
        first_position: int = 0,
    ) -> torch.Tensor:
        """(L,) tokens t+1 and (L, H) hidden t, standing after what the cache holds -> (L, H), after the norm."""
        length, past = len(tokens), cache.get_seq_length()
        embedded = self.pre_fc_norm_embedding(target.get_input_embeddings()(tokens))
        x = self.fc(torch.cat([embedded, self.pre_fc_norm_hidden(hidden)], dim=-1))[None]
        positions = torch.arange(past, past + length)[None]
        y = self.layers[0](
            x,
            position_embeddings=target.model.rotary_emb(x, positions + first_position),
            attention_mask=torch.full((length, past + length), -math.inf).triu(past + 1)[None, None],
            past_key_values=cache,
        )
        return self.norm(y)[0]


def build_head(target: PreTrainedModel, family: Family, generator: torch.Generator) -> Head:
    head = Head(target, family).eval()
    for name, weight in sorted(head.state_dict().items()):
        weight.copy_(draw(name, weight, generator))
    return head


def draw(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random weight that bfloat16 holds exactly, and that differs from what an initialisation leaves.

    A zero-centred norm at 0 would hide that a loader forgot it.
    """
    if name.endswith("A_log"):
        value = (0.3 + 3 * torch.rand(like.shape, generator=generator)).log()
    elif name.endswith(("dt_bias", "conv1d.weight")):
        value = 0.5 * torch.randn(like.shape, generator=generator)
    elif name.endswith("linear_attn.norm.weight"):  # the only norm that is not zero-centred
        value = 1 + 0.2 * torch.randn(like.shape, generator=generator)
    elif like.ndim == 1:
        # bfloat16 holds 1 + w exactly too: that is where mlx-lm adds the 1.
        value = (1 + 0.2 * torch.randn(like.shape, generator=generator)).bfloat16().float() - 1
    else:
        value = torch.randn(like.shape, generator=generator) * like.shape[-1] ** -0.5
    return value.bfloat16().float()


# --------------------------------------------------------------------------- golden values


class Run(NamedTuple):
    """What the target computes along a token list."""

    tokens: torch.Tensor  # (T,)
    logits: torch.Tensor  # (T, V)
    hidden: torch.Tensor  # (T, H), after the final norm
    prenorm: torch.Tensor  # (T, H)
    layer_inputs: torch.Tensor  # (L, T, H)
    routing_margin: float  # of its narrowest choice of experts


class Round(NamedTuple):
    """One draft round."""

    tokens: torch.Tensor  # (k,)
    logits: torch.Tensor  # (k, V)
    hidden: torch.Tensor  # (k, H)
    routing_margin: float


TAGS = {"mtp": "hidden", "mtp_prenorm": "prenorm"}  # tag -> the field of Run that pairs are made of


@contextmanager
def routing_margins(model: nn.Module) -> Iterator[list[float]]:
    """How clear each choice of experts is while the block runs; infinitely where there are no experts."""
    margins = [math.inf]
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]

    def record(router: Any, inputs: Any, outputs: Any) -> None:
        margins.append(margin(outputs[0].softmax(-1), router.top_k))

    hooks = [router.register_forward_hook(record) for router in routers]
    yield margins
    for hook in hooks:
        hook.remove()


def run_target(target: PreTrainedModel, tokens: torch.Tensor) -> Run:
    prenorm: list[torch.Tensor] = []
    hook = target.model.norm.register_forward_pre_hook(lambda norm, inputs: prenorm.append(inputs[0][0]))
    with routing_margins(target) as margins:
        output = target(input_ids=tokens[None], use_cache=False, output_hidden_states=True)
    hook.remove()
    *inputs, hidden = output.hidden_states  # transformers replaces the last one by the normed hidden
    return Run(tokens, output.logits[0], hidden[0], prenorm[0], torch.cat(inputs), min(margins))


def prime(target: PreTrainedModel, head: Head, run: Run, tag: str, pairs: int) -> tuple[torch.Tensor, DynamicCache]:
    """The head's output for the true pairs 0..pairs-1, and its cache."""
    cache = DynamicCache(config=head.config)
    hidden = getattr(run, TAGS[tag])
    return head(target, run.tokens[1 : pairs + 1], hidden[:pairs], cache), cache


def draft(target: PreTrainedModel, head: Head, run: Run, bonus: int, tag: str) -> Round:
    """Draft DRAFTS tokens after tokens[bonus], every one from the argmax before it."""
    steps = []
    with routing_margins(head) as margins:
        hidden, cache = prime(target, head, run, tag, bonus)
        hidden = hidden[-1:]
        for step in range(DRAFTS):
            if step:
                hidden = head(target, steps[-1][0][None], hidden, cache)
            logits = target.lm_head(hidden)[0]
            steps.append((logits.argmax(-1), logits, hidden[0]))
    tokens, logits, hiddens = (torch.stack(column) for column in zip(*steps, strict=True))
    return Round(tokens, logits, hiddens, min(margins))


def golden_rounds(target: PreTrainedModel, head: Head) -> tuple[Run, Arrays]:
    """The first random token list with sound logits and no near-tie, and its draft rounds."""
    for seed in itertools.count():
        run = run_target(target, random_tokens(LENGTH, seed))
        if decode_error(target, run) > AGREEMENT:
            continue
        rounds = {tag: [draft(target, head, run, bonus, tag) for bonus in BONUS] for tag in TAGS}
        drafted = [one for several in rounds.values() for one in several]
        routing = min(one.routing_margin for one in (run, *drafted))
        if routing > ROUTING_MARGIN and min(margin(one.logits) for one in drafted) > MARGIN:
            return run, merge(round_arrays(tag, several) for tag, several in rounds.items())
    raise AssertionError("unreachable")


def decode_error(target: PreTrainedModel, run: Run) -> float:
    """How far the logits are from those of decoding one token at a time.

    A whole list goes through the chunked rule, a single token through the recurrence; on some lists the chunked
    one loses digits.
    """
    cache = DynamicCache(config=target.config)
    steps = [target(input_ids=token[None, None], past_key_values=cache, use_cache=True) for token in run.tokens]
    return float((torch.cat([step.logits[0] for step in steps]) - run.logits).abs().max())


def round_arrays(tag: str, rounds: list[Round]) -> Arrays:
    tokens, logits, hidden, _ = (list(column) for column in zip(*rounds, strict=True))
    return {
        f"{tag}_tokens": ints(torch.stack(tokens)),
        f"{tag}_logits": floats(torch.stack(logits)),
        f"{tag}_hidden": floats(torch.stack(hidden)),
    }


def run_arrays(target: PreTrainedModel, head: Head, run: Run) -> Arrays:
    _, cache = prime(target, head, run, "mtp", LENGTH - 1)
    return {
        "tokens": ints(run.tokens),
        "logits": floats(run.logits),
        "hidden": floats(run.hidden),
        "prenorm": floats(run.prenorm),
        "layer_positions": np.array(KEPT_POSITIONS, np.int32),
        "layer_inputs": floats(run.layer_inputs[:, list(KEPT_POSITIONS)]),
        "mtp_keys": floats(cache.layers[0].keys[0]),
        "mtp_values": floats(cache.layers[0].values[0]),
        "draft_bonus": np.array(BONUS, np.int32),
    }


# --------------------------------------------------------------------------- proofs about the golden values


def prove_head(target: PreTrainedModel, head: Head, run: Run) -> None:
    """A chain with a cache equals one pass over all its pairs, wherever the first pair stands."""
    for bonus, first_position in itertools.product(BONUS, (0, 1)):
        one = draft(target, head, run, bonus, "mtp")
        tokens = torch.cat([run.tokens[1 : bonus + 1], one.tokens[:-1]])
        hidden = torch.cat([run.hidden[:bonus], one.hidden[:-1]])
        whole = head(target, tokens, hidden, DynamicCache(config=head.config), first_position)
        torch.testing.assert_close(target.lm_head(whole[-DRAFTS:]), one.logits, rtol=0, atol=1e-4)


def prove_varied(arrays: Arrays) -> float:
    """A tiny random model may repeat one token, and a test on such a list would prove nothing.

    Returns by how much the logits of the negative control differ, in the draft where they differ least.
    """
    assert len(np.unique(arrays["logits"].argmax(-1))) > LENGTH // 3
    assert all(len(np.unique(arrays[f"{tag}_tokens"])) >= 2 * len(BONUS) for tag in TAGS)
    difference = float(np.abs(arrays["mtp_logits"] - arrays["mtp_prenorm_logits"]).max(-1).min())
    assert difference > 0.05
    return difference


# --------------------------------------------------------------------------- writing the released layout


def write_variant(folder: Path, variant: Variant, generator: torch.Generator) -> None:
    target = build_target(variant, generator)
    head = build_head(target, variant.family, generator)
    run, rounds = golden_rounds(target, head)
    continuations = (golden_greedy(partial(run_target, target), length) for length in PROMPTS)
    arrays = merge([run_arrays(target, head, run), *continuations, rounds])
    prove_head(target, head, run)
    control = prove_varied(arrays)

    write_json(folder / "config.json", released_config(target, variant))
    write_generation_config(folder, top_k=20)
    write_tokenizer(folder)
    trunk, mtp = released_trunk(target, variant, generator), released_head(head, variant)
    write_weights(folder, shards_of(trunk, mtp, variant.shards))
    np.savez_compressed(folder / "golden.npz", **arrays)
    check(folder, target, run, f"tensors: {len(trunk)} + {len(mtp)} mtp  prenorm control: {control:.2f}")


def released_config(target: PreTrainedModel, variant: Variant) -> dict[str, Any]:
    name, text = variant.family.name, written(target.config)
    text |= {"dtype": "bfloat16", "full_attention_interval": variant.interval}
    if not variant.family.nested:
        del text["rope_parameters"], text["layer_types"]
        return text | RELEASED_NEXT | {"architectures": [f"{name}ForCausalLM"]}
    version = text.pop("transformers_version")
    vision = class_of(f"{name}VisionConfig")(**VISION)
    config = class_of(f"{name}Config")(vision_config=vision, tie_word_embeddings=variant.tied)
    own = {"architectures": [f"{name}ForConditionalGeneration"], "transformers_version": version}
    return written(config) | own | {"dtype": "bfloat16", "text_config": text | RELEASED_3_5}


def written(config: Any) -> dict[str, Any]:
    """The config as save_pretrained writes it."""
    content: dict[str, Any] = json.loads(config.to_json_string())
    return content


def released_trunk(target: PreTrainedModel, variant: Variant, generator: torch.Generator) -> Tensors:
    tensors = target.state_dict()
    if variant.tied:
        del tensors["lm_head.weight"]
    if variant.family.nested:
        tensors = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
    stubs = {name: torch.randn(4, 8, generator=generator) for name in variant.stubs}
    return rounded((split_experts(tensors) if variant.split_trunk else tensors) | stubs)


def released_head(head: Head, variant: Variant) -> Tensors:
    tensors = {f"mtp.{name}": tensor for name, tensor in head.state_dict().items()}
    return rounded(split_experts(tensors) if variant.split_head else tensors)


def rounded(tensors: Tensors) -> Tensors:
    """As stored; contiguous, because split experts are views."""
    return {
        name: tensor.clone() if name.endswith("A_log") else tensor.bfloat16().contiguous()
        for name, tensor in tensors.items()
    }


def split_experts(tensors: Tensors) -> Tensors:
    """experts.gate_up_proj [E, 2I, H] and experts.down_proj [E, H, I] as three matrices per expert."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, fused = name.rpartition(".")
        if not prefix.endswith(".experts"):
            split[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
            named = parts if fused == "gate_up_proj" else [(fused, matrix)]
            split |= {f"{prefix}.{expert}.{part}.weight": weight for part, weight in named}
    return split


def shards_of(trunk: Tensors, mtp: Tensors, shards: int) -> list[Tensors]:
    """The trunk over all shards, the head over the last two."""
    head = [{} for _ in range(shards - 2)] + dealt(mtp, min(shards, 2))
    return [part | piece for part, piece in zip(dealt(trunk, shards), head, strict=True)]


# --------------------------------------------------------------------------- reading everything back


def check(folder: Path, target: PreTrainedModel, run: Run, remark: str) -> None:
    """Transformers reads back the very weights, and mlx-lm computes the same logits; both drop the head."""
    error = float((run_target(reload(folder, target, set()), run.tokens).logits - run.logits).abs().max())
    assert error == 0
    mlx_error = mlx_lm_error(folder, run.tokens, run.logits)
    assert mlx_error < 2e-3
    print_sizes(folder, f"transformers reload: {error:.1f}  mlx-lm: {mlx_error:.1e}  {remark}")


if __name__ == "__main__":
    write_all(VARIANTS, write_variant, "Write the golden fixtures of Qwen 3.5 and Qwen3-Next.")
