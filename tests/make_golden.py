"""Writes tests/fixtures: tiny Gemma 4 checkpoints and what torch and transformers compute from them.

    python tests/make_golden.py [--out tests/fixtures] [--only gemma4_ple ...]

Run by hand, never by CI. Needs torch, transformers 5.22.2 (5.23.0 cannot construct an assistant), tokenizers
and mlx-lm. Everything follows from the seeds below; a second run on the same machine writes the same bytes.

Each folder is a checkpoint as released: config.json, generation_config.json, model.safetensors (gemma4_moe:
three shards and an index, with stub vision and audio tensors), a byte-level tokenizer, and assistant/.
gemma4_keqv also has assistant_ordered/, and config_new_style.json: the same config, word for word as
save_pretrained writes it. Weights are stored in bfloat16; the golden values are computed in float32 from
those rounded weights.

golden.npz, float32 and int32. T = 56 tokens, W = 16 window, V = 320 vocabulary, H = 64 hidden, L layers,
k = 4 drafts, n = 7 draft rounds:

    tokens          (T,)       bos, then random ids; all but the greedy arrays is teacher-forced along them
    logits          (T, V)     target, after the softcap
    hidden          (T, H)     target, AFTER the final norm: what an assistant is given
    layer_positions (6,)       positions at which layer_inputs are kept
    layer_inputs    (L, 6, H)  residual stream as it enters each layer; entry 0 is the scaled embedding
    {sliding,full}_{keys,values}  (kv heads, T, head dim)
                               of the layer whose KV the assistant reads, whole length, after norms and RoPE
    prompt_{12,30}  (12,) (30,)  prompts, shorter and longer than the window
    greedy_{12,30}  (24,)      their greedy continuations without a cache; none contains an end token
    draft_bonus     (n,)       P, the index of the bonus token in each draft round

Draft rounds, for A in {assistant, assistant_ordered} and a tag in {p, pm1, hf}. The bonus is tokens[P], the
hidden is hidden[P-1], the full layer sees keys 0..P-1, and each draft is the argmax of its own logits:

    {A}_{tag}_tokens    (n, k)     drafts
    {A}_{tag}_logits    (n, k, V)  an ordered head leaves unselected ids at the least selected logit minus 1
    {A}_{tag}_hidden    (n, k, H)  post_projection, fed to the next draft
    {A}_{tag}_selected  (n, k, V)  bool, ordered heads only: ids whose logit was computed

    tag   position  sliding keys seen
    p     P         P-min(P, W) .. P-1      what we do by default
    pm1   P-1       P-min(P, W) .. P-1
    hf    P         P-min(P, W+1) .. P-1    what transformers does in its first round; for information only

No greedy token, draft, choice of centroids or choice of experts is a near-tie: see MARGIN, ROUTING_MARGIN.
"""

import copy
import itertools
import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
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
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

LENGTH, WINDOW = 56, 16
BONUS = (3, 12, 15, 16, 17, 30, 50)  # around the window, and far above it
KEPT_POSITIONS = (0, 1, 15, 16, 17, 55)
SLIDING, FULL = "sliding_attention", "full_attention"

SharedKV = dict[str, tuple[torch.Tensor, torch.Tensor]]

# --------------------------------------------------------------------------- variants

ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_attention_heads": HEADS,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "max_position_embeddings": 1024,
    "rope_parameters": ROPE,
}
TARGET = COMMON | {"hidden_size": HIDDEN, "intermediate_size": 48, "final_logit_softcapping": 30.0}
ASSISTANT = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
}
NO_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
ONE_KV_HEAD = {"num_key_value_heads": 1}
K_EQ_V = {"num_key_value_heads": 2, "num_global_key_value_heads": 1, "attention_k_eq_v": True}


def layers(sliding: int, repeats: int) -> dict[str, Any]:
    types = ([SLIDING] * sliding + [FULL]) * repeats
    return {"layer_types": types, "num_hidden_layers": len(types)}


@dataclass(frozen=True)
class Variant:
    """One target with its assistants."""

    family: str  # class prefix: Gemma4 or Gemma4Unified
    text: dict[str, Any]
    kv: dict[str, Any]  # shared by target and assistants
    inert: dict[str, Any] = field(default_factory=dict)  # keys the released text config has without effect
    assistants: tuple[str, ...] = ("assistant",)
    ordered: tuple[str, ...] = ()  # those of them with an ordered head
    assistant_shared_layers: int = 4  # as written; 0 stands for "all of them" in some released files
    shards: int = 1
    stubs: tuple[str, ...] = ()  # tensors of other modalities, which a text loader leaves alone
    new_style: bool = False


VARIANTS = {
    "gemma4_ple": Variant(  # like E2B
        family="Gemma4",
        text=layers(4, 2)
        | {
            "num_kv_shared_layers": 5,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "use_double_wide_mlp": True,
        },
        kv=ONE_KV_HEAD,
        ordered=("assistant",),
    ),
    "gemma4_keqv": Variant(  # like 31B
        family="Gemma4",
        text=layers(2, 2) | NO_PER_LAYER,
        kv=K_EQ_V,
        assistants=("assistant", "assistant_ordered"),
        ordered=("assistant_ordered",),
        new_style=True,
    ),
    "gemma4_moe": Variant(  # like 26B-A4B
        family="Gemma4",
        text=layers(2, 2)
        | NO_PER_LAYER
        | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
        kv=K_EQ_V,
        shards=3,
        stubs=(
            "model.audio_tower.layers.0.self_attn.q_proj.linear.weight",
            "model.embed_vision.embedding_projection.weight",
            "model.vision_tower.encoder.layers.0.mlp.gate_proj.linear.weight",
            "model.vision_tower.patch_embedder.position_embedding_table",
        ),
    ),
    "gemma4_unified": Variant(  # like 12B
        family="Gemma4Unified",
        text=layers(2, 2),
        kv=K_EQ_V,
        inert={
            "enable_moe_block": False,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 262_144,
        },
        assistant_shared_layers=0,
    ),
}

# --------------------------------------------------------------------------- models


def build_target(variant: Variant, generator: torch.Generator) -> PreTrainedModel:
    text = class_of(f"{variant.family}TextConfig")(**TARGET, **variant.kv, **variant.text)
    config = class_of(f"{variant.family}Config")(text_config=text, vision_config=None, audio_config=None)
    return finish(class_of(f"{variant.family}ForConditionalGeneration"), config, draw, generator)


def build_assistant(variant: Variant, name: str, generator: torch.Generator) -> PreTrainedModel:
    none = NO_PER_LAYER if variant.family == "Gemma4" else {}
    config = class_of(f"{variant.family}AssistantConfig")(
        text_config=class_of(f"{variant.family}TextConfig")(**ASSISTANT, **variant.kv, **none),
        backbone_hidden_size=HIDDEN,
        use_ordered_embeddings=name in variant.ordered,
        num_centroids=16,
        centroid_intermediate_top_k=4,
    )
    return finish(class_of(f"{variant.family}AssistantForCausalLM"), config, draw, generator)


def draw(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random weight that bfloat16 holds exactly, and that differs from what an initialisation leaves.

    A norm at 1 or a layer scalar at 1 would hide that a loader forgot it.
    """
    if name.endswith("token_ordering"):
        return torch.randperm(like.numel(), generator=generator)
    if name.endswith("layer_scalar"):
        value = 0.6 + 0.6 * torch.rand(like.shape, generator=generator)
    elif name.endswith(("router.scale", "per_expert_scale")):
        value = 1 + 0.3 * torch.randn(like.shape, generator=generator)
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        # Attention has no 1/sqrt(d): around 1 it would be nearly one-hot, and rounding noise would grow.
        value = 0.5 + 0.1 * torch.randn(like.shape, generator=generator)
    elif like.ndim == 1:  # norms
        value = 1 + 0.2 * torch.randn(like.shape, generator=generator)
    else:
        value = torch.randn(like.shape, generator=generator) * like.shape[-1] ** -0.5
    return value.bfloat16().float()


# --------------------------------------------------------------------------- golden values


class Run(NamedTuple):
    """What the target computes along a token list."""

    tokens: torch.Tensor  # (T,)
    logits: torch.Tensor  # (T, V)
    hidden: torch.Tensor  # (T, H), after the final norm
    layer_inputs: torch.Tensor  # (L, T, H)
    kv: SharedKV  # (1, heads, T, head dim)
    routing_margin: float  # of its narrowest choice of experts


class Round(NamedTuple):
    """One draft round; `margin` is the narrowest choice made in it."""

    tokens: torch.Tensor  # (k,)
    logits: torch.Tensor  # (k, V)
    hidden: torch.Tensor  # (k, H)
    margin: float


@dataclass(frozen=True)
class Tag:
    """How a draft round places its query: `offset` from P, and how many sliding keys at most."""

    offset: int
    sliding_keys: int


TAGS = {"p": Tag(0, WINDOW), "pm1": Tag(-1, WINDOW), "hf": Tag(0, WINDOW + 1)}


def run_target(target: PreTrainedModel, tokens: torch.Tensor) -> Run:
    output = target(
        input_ids=tokens[None],
        use_cache=False,
        output_hidden_states=True,
        output_router_logits=True,
        return_shared_kv_states=True,
    )
    *inputs, hidden = output.hidden_states  # transformers replaces the last one by the normed hidden
    kv = {layer_type: output.shared_kv_states[layer_type] for layer_type in (SLIDING, FULL)}
    # Per MoE layer (T, experts), and despite their name probabilities. Unified models have no such field.
    routers = output.get("router_logits") or ()
    routing = [margin(router, target.config.text_config.top_k_experts) for router in routers]
    return Run(tokens, output.logits[0], hidden[0], torch.cat(inputs), kv, min(routing, default=math.inf))


def visible_kv(kv: SharedKV, bonus: int, sliding_keys: int) -> SharedKV:
    first = {FULL: 0, SLIDING: max(0, bonus - sliding_keys)}
    return {
        layer_type: (keys[:, :, first[layer_type] : bonus], values[:, :, first[layer_type] : bonus])
        for layer_type, (keys, values) in kv.items()
    }


def draft(target: PreTrainedModel, assistant: PreTrainedModel, run: Run, bonus: int, tag: Tag) -> Round:
    """Draft DRAFTS tokens after tokens[bonus], every one from the argmax before it."""
    kv = visible_kv(run.kv, bonus, tag.sliding_keys)
    token, hidden = run.tokens[None, bonus : bonus + 1], run.hidden[None, bonus - 1 : bonus]
    position = torch.tensor([[bonus + tag.offset]])
    steps, margins = [], []
    for _ in range(DRAFTS):
        embedded = target.get_input_embeddings()(token)  # scaled by sqrt(H)
        inputs = torch.cat([embedded, hidden], dim=-1)
        output = assistant(inputs_embeds=inputs, position_ids=position, shared_kv_states=kv, output_hidden_states=True)
        token, hidden = output.logits.argmax(-1), output.last_hidden_state
        steps.append((token[0, 0], output.logits[0, 0], hidden[0, 0]))
        margins.append(min(margin(output.logits), centroid_margin(assistant, output.hidden_states[-1])))
    tokens, logits, hiddens = (torch.stack(column) for column in zip(*steps, strict=True))
    return Round(tokens, logits, hiddens, min(margins))


def centroid_margin(assistant: PreTrainedModel, normed: torch.Tensor) -> float:
    """How clear the cut between taken and left centroids is."""
    head = assistant.masked_embedding
    if head is None:
        return math.inf
    return margin(head.centroids(normed), head.centroid_intermediate_top_k)


def golden_rounds(target: PreTrainedModel, assistants: dict[str, PreTrainedModel]) -> tuple[Run, Arrays]:
    """The first random token list in which no draft is a near-tie, and its draft rounds."""
    for seed in itertools.count():
        run = run_target(target, random_tokens(LENGTH, seed))
        if run.routing_margin < ROUTING_MARGIN:
            continue
        rounds = {
            (name, tag): [draft(target, assistant, run, bonus, TAGS[tag]) for bonus in BONUS]
            for name, assistant in assistants.items()
            for tag in TAGS
        }
        if min(one.margin for several in rounds.values() for one in several) > MARGIN:
            return run, merge(
                round_arrays(f"{name}_{tag}", several, assistants[name]) for (name, tag), several in rounds.items()
            )
    raise AssertionError("unreachable")


def round_arrays(prefix: str, rounds: list[Round], assistant: PreTrainedModel) -> Arrays:
    tokens, logits, hidden, _ = (list(column) for column in zip(*rounds, strict=True))
    arrays = {
        f"{prefix}_tokens": ints(torch.stack(tokens)),
        f"{prefix}_logits": floats(torch.stack(logits)),
        f"{prefix}_hidden": floats(torch.stack(hidden)),
    }
    head = assistant.masked_embedding
    if head is not None:
        # What is not selected holds one value, the least of its row.
        scores = arrays[f"{prefix}_logits"]
        selected = scores > scores.min(axis=-1, keepdims=True)
        assert (selected.sum(-1) == head.centroid_intermediate_top_k * head.vocab_size_per_centroid).all()
        arrays[f"{prefix}_selected"] = selected
    return arrays


def run_arrays(run: Run) -> Arrays:
    arrays = {
        "tokens": ints(run.tokens),
        "logits": floats(run.logits),
        "hidden": floats(run.hidden),
        "layer_positions": np.array(KEPT_POSITIONS, np.int32),
        "layer_inputs": floats(run.layer_inputs[:, list(KEPT_POSITIONS)]),
        "draft_bonus": np.array(BONUS, np.int32),
    }
    for name, layer_type in (("sliding", SLIDING), ("full", FULL)):
        keys, values = run.kv[layer_type]
        arrays |= {f"{name}_keys": floats(keys[0]), f"{name}_values": floats(values[0])}
    return arrays


# --------------------------------------------------------------------------- proofs about the golden values


def prove_rounds(target: PreTrainedModel, assistant: PreTrainedModel, run: Run) -> None:
    """Transformers hides none of the keys we give it, and hides exactly those the tag "hf" leaves out."""
    for bonus in BONUS:
        given = visible_kv(run.kv, bonus, WINDOW)
        masks = assistant.create_attention_masks(torch.zeros(1, 1, 2 * HIDDEN), None, given)
        assert all(mask is None or bool((mask == 0).all()) for mask in masks.values())

        plain = draft(target, assistant, run, bonus, TAGS["p"]).logits
        for layer_type in (SLIDING, FULL):
            oldest = bonus - given[layer_type][0].shape[2]
            moved = draft(target, assistant, perturbed(run, layer_type, oldest), bonus, TAGS["p"]).logits
            assert float((moved - plain)[0].abs().max()) > 1e-3

        hf = draft(target, assistant, run, bonus, TAGS["hf"]).logits
        assert torch.equal(hf, plain) == (bonus <= WINDOW)
        tokens, logits = first_round_of_transformers(target, assistant, run, bonus)
        assert torch.equal(tokens, hf.argmax(-1))
        assert float((logits - hf).abs().max()) < 1e-4


def perturbed(run: Run, layer_type: str, position: int) -> Run:
    """The same run with another value cached at one position."""
    keys, values = run.kv[layer_type]
    values = values.clone()
    values[:, :, position] *= -1
    return run._replace(kv=run.kv | {layer_type: (keys, values)})


def first_round_of_transformers(
    target: PreTrainedModel, assistant: PreTrainedModel, run: Run, bonus: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What its own driver drafts after a prefill of tokens[:bonus], given the whole KV and its own masks."""
    prompt = run.tokens[None, :bonus]
    output = target(input_ids=prompt, output_hidden_states=True, return_shared_kv_states=True)
    assistant.generation_config.num_assistant_tokens = DRAFTS
    driver = SinglePositionMultiTokenCandidateGenerator(
        assistant, target.get_input_embeddings(), GenerationConfig(max_length=1024)
    )
    ids, logits = driver.get_candidates(run.tokens[None, : bonus + 1], {}, output, False, 0)
    return ids[0, bonus + 1 :], logits[0]


def prove_varied(arrays: Arrays, assistants: Iterable[str]) -> None:
    """A tiny random model may repeat one token; a test on such a list would prove nothing."""
    assert len(np.unique(arrays["logits"].argmax(-1))) > LENGTH // 3
    for name in assistants:
        drafts = {tag: arrays[f"{name}_{tag}_tokens"] for tag in TAGS}
        assert all(len(np.unique(one)) >= len(BONUS) for one in drafts.values())
        assert not np.array_equal(arrays[f"{name}_p_logits"], arrays[f"{name}_pm1_logits"])


# --------------------------------------------------------------------------- writing the released layout


def write_variant(folder: Path, variant: Variant, generator: torch.Generator) -> None:
    target = build_target(variant, generator)
    assistants = {name: build_assistant(variant, name, generator) for name in variant.assistants}
    run, rounds = golden_rounds(target, assistants)
    arrays = merge(
        [run_arrays(run), *(golden_greedy(partial(run_target, target), length) for length in PROMPTS), rounds]
    )
    for assistant in assistants.values():
        prove_rounds(target, assistant, run)
    prove_varied(arrays, assistants)

    write_target(folder, target, variant, generator)
    for name, assistant in assistants.items():
        write_assistant(folder / name, assistant, variant)
    np.savez_compressed(folder / "golden.npz", **arrays)
    check(folder, target, assistants, variant, run)


def write_target(folder: Path, target: PreTrainedModel, variant: Variant, generator: torch.Generator) -> None:
    config, tensors = saved(target)
    stubs = {name: torch.randn(4, 8, generator=generator).bfloat16() for name in variant.stubs}
    text = flat_text_config(config["text_config"], variant.kv) | variant.inert
    # mlx-lm reads the vocabulary size at the top.
    write_json(folder / "config.json", config | {"text_config": text, "vocab_size": VOCAB})
    if variant.new_style:
        write_json(folder / "config_new_style.json", config)
    write_generation_config(folder, top_k=64)
    write_weights(folder, dealt(tensors | stubs, variant.shards))
    write_tokenizer(folder)


def write_assistant(folder: Path, assistant: PreTrainedModel, variant: Variant) -> None:
    config, tensors = saved(assistant)
    text = flat_text_config(config["text_config"], variant.kv)
    text |= NO_PER_LAYER | {"num_kv_shared_layers": variant.assistant_shared_layers}
    write_json(folder / "config.json", config | {"text_config": text})
    write_weights(folder, [tensors])


def saved(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors as save_pretrained writes them, in bfloat16."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy.deepcopy(model).bfloat16().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        return config, load_file(folder / "model.safetensors")


def flat_text_config(text: dict[str, Any], kv: dict[str, Any]) -> dict[str, Any]:
    """The style of the released files: two flat keys instead of `per_layer_config`."""
    flat = {name: value for name, value in text.items() if name != "per_layer_config"}
    global_heads = kv.get("num_global_key_value_heads")
    return flat | {"global_head_dim": COMMON["global_head_dim"], "num_global_key_value_heads": global_heads}


# --------------------------------------------------------------------------- reading everything back


def check(
    folder: Path, target: PreTrainedModel, assistants: dict[str, PreTrainedModel], variant: Variant, run: Run
) -> None:
    """Transformers reads back the very weights, and mlx-lm computes the same logits."""
    again = reload(folder, target, set(variant.stubs))
    assert torch.equal(run_target(again, run.tokens).logits, run.logits)
    for name, assistant in assistants.items():
        other = reload(folder / name, assistant, set())
        for bonus, tag in itertools.product(BONUS, TAGS.values()):
            before, after = (draft(target, a, run, bonus, tag).logits for a in (assistant, other))
            assert torch.equal(before, after)
    error = mlx_lm_error(folder, run.tokens, run.logits)
    assert error < 1e-3
    print_sizes(folder, f"transformers reload: exact  mlx-lm: {error:.1e}")


if __name__ == "__main__":
    write_all(VARIANTS, write_variant, "Write the golden fixtures of Gemma 4.")
