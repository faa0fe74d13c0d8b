"""A target that several machines compute together says what one machine says, and they never lose step."""

import json
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import local
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import FIXTURES, AlteredTarget, DialledDrafter, gap, plain, varied_tokens
from machines import OPTIONS, Meeting, Seat, start
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_tokenizer

from mtp_mlx import generation
from mtp_mlx.accept import normalise
from mtp_mlx.admission import Admission
from mtp_mlx.checkpoint import Checkpoint
from mtp_mlx.choosing import Callables, Rules
from mtp_mlx.depth import Fixed, Outcome
from mtp_mlx.errors import RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.grammar import GrammarState
from mtp_mlx.loading import load
from mtp_mlx.models import gemma4, qwen3_5
from mtp_mlx.models.parts import Part
from mtp_mlx.rounds import rounds
from mtp_mlx.sampling import Greedy, Sample
from mtp_mlx.sequence import Sequence
from mtp_mlx.sharding import Unread, share
from mtp_mlx.types import Pair, Span

Form = tuple[int, int, str] | None
Model = gemma4.Model | qwen3_5.Model
FORMS: list[Form] = [None, (32, 4, "affine"), (16, 4, "nvfp4")]


def target(variant: str, form: Form = None) -> Model:
    """A tiny target of its own, in float32, or quantised wherever its widths allow."""
    pair, _ = load(FIXTURES / variant, drafter=None, dtype=mx.float32)
    assert isinstance(pair.target, Model)
    if form is not None:
        nn.quantize(
            pair.target,
            *form[:2],
            mode=form[2],
            class_predicate=lambda _, module: (
                "weight" in module
                and not isinstance(module, nn.RMSNorm | nn.Conv1d | qwen3_5.GatedRMSNorm)
                and module.weight.shape[-1] % form[0] == 0
            ),
        )
    module: nn.Module = pair.target
    mx.eval(module.parameters())  # for other threads
    return pair.target


def said(model: Model, text: list[int], part: Part | None = None) -> mx.array:
    """Log-probabilities after each token of a text: a prompt in two chunks, then blocks that are kept in part."""
    if part is not None:
        share(model, part, "it")
    cache, rows = model.make_cache(), []
    cache.reserve(len(text) + 8)
    for start_, length in ((0, 20), (20, 5)):
        rows.append(model(mx.array([text[start_ : start_ + length]]), cache, Span(start_, length)).logits)
        cache.commit(length)
        mx.eval(cache.arrays())
    done = 25
    while done + 4 <= len(text):
        logits = model(mx.array([text[done : done + 4]]), cache, cache.span(4)).logits
        kept = 1 + done % 4
        rows.append(logits[:, :kept])
        cache.commit(mx.array([kept]))
        mx.eval(cache.arrays(), rows)
        done += kept
    answer = normalise(mx.concatenate(rows, axis=1))[0]
    mx.eval(answer)
    return answer


CASES = [
    ("gemma4_ple", 2, None),
    ("gemma4_keqv", 2, (32, 4, "affine")),
    ("gemma4_keqv", 4, None),
    ("gemma4_moe", 2, (16, 4, "nvfp4")),
    ("gemma4_moe", 4, None),
    ("gemma4_unified", 3, None),
    ("qwen3_5_dense", 2, (32, 4, "affine")),
    ("qwen3_5_dense", 4, None),
    ("qwen3_5_tied", 3, (16, 4, "nvfp4")),
    ("qwen3_5_moe", 2, (16, 4, "nvfp4")),
    ("qwen3_5_moe", 4, None),
    ("qwen3_next", 2, None),
]


@pytest.mark.parametrize(("variant", "size", "form"), CASES, ids=str)
def test_machines_together_say_what_one_says(variant: str, size: int, form: Form) -> None:
    text = varied_tokens(50)
    wanted = said(target(variant, form), text)
    meeting = Meeting(size)
    models = [target(variant, form) for _ in range(size)]
    whole = models[0].nbytes
    found = meeting.run(lambda rank: said(models[rank], text, meeting.part(rank)))
    assert all(gap(each, found[0]) == 0 for each in found[1:])
    assert gap(found[0], wanted) < 1e-4
    assert max(model.nbytes for model in models) < whole


def test_each_machine_holds_its_keys_and_values_only() -> None:
    for variant in ("gemma4_keqv", "qwen3_5_dense"):
        model = target(variant)
        share(model, Part(1, 2), "it")
        cache = model.make_cache()
        cache.reserve(64)
        model(mx.array([varied_tokens(8)]), cache, Span(0, 8))
        cache.commit(8)
        assert cache.nbytes - cache.position.nbytes <= model.kv_bytes(64) < target(variant).kv_bytes(64)


def test_more_machines_than_there_is_to_share_out_are_refused() -> None:
    with pytest.raises(RequestError, match=r"nothing of it can be shared out among 512 machines.*use fewer machines"):
        share(target("qwen3_5_dense"), Part(0, 512), "it")
    model = target("qwen3_5_dense")
    model.layers[0].mlp.down_proj = LoRALinear.from_base(model.layers[0].mlp.down_proj)
    with pytest.raises(RequestError, match=r"it cannot be computed by 2 machines: a LoRALinear.*use one machine"):
        share(model, Part(0, 2), "it")


PROMPT, GREEDY = varied_tokens(24), Rules()


def written(pair: Pair, chooser: Rules | Callables, k: int = 3, grammar: GrammarState | None = None) -> list[int]:
    """The text of some rounds, and how many drafts each kept."""
    sequence = Sequence(pair, chooser, 3)
    sequence.grammar = grammar
    sequence.prefill(PROMPT, 16, lambda done, total: None)
    told: list[int] = []
    while len(sequence.text) < len(PROMPT) + 16:
        result = sequence.round(k if sequence.ready else 0)
        told += [*result.tokens, -1 - result.accepted]
    return told


@cache
def dialled(variant: str, seed: int = 0, rules: Rules = GREEDY) -> DialledDrafter:
    """Drafts of which six in ten are what the target chooses without drafts."""
    nobody = DialledDrafter.dial([], 0.0)
    text = written(Pair(target(variant), nobody), Rules(rules.sampler), k=0)
    return DialledDrafter.dial(PROMPT + [token for token in text if token >= 0], 0.6, seed)


def test_a_part_is_read_without_the_rest(tmp_path: Path) -> None:
    """Beside what it holds, a machine needs memory for one layer."""
    config = json.loads((FIXTURES / "qwen3_5_dense" / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 128, "intermediate_size": 6144}
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole: nn.Module = qwen3_5.Model(qwen3_5.TextConfig.from_dict(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(whole.parameters())), {"format": "mlx"})
    model = qwen3_5.Model(qwen3_5.TextConfig.from_dict(config))
    del whole
    checkpoint = Unread.of(Checkpoint.open(tmp_path))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    checkpoint.fill(model, model.sanitize)
    held = share(model, Part(0, 2), "it")
    layer = 4 * 3 * 128 * 6144
    assert held.nbytes < 0.6 * held.whole and held.whole > 7 * layer
    assert mx.get_peak_memory() - before < held.nbytes + 1.5 * layer
    assert 0.9 * held.nbytes < mx.get_active_memory() - before < held.nbytes + 0.5 * layer
    assert mx.get_cache_memory() < 0.5 * layer


RULES = [GREEDY, Rules(Sample(0.9)), Rules(Sample(0.9), drafts=Sample(0.7))]


@pytest.mark.parametrize(("variant", "size"), [("gemma4_moe", 2), ("qwen3_5_moe", 4)])
@pytest.mark.parametrize("rules", RULES, ids=["greedy", "seeded", "rejection"])
def test_rounds_of_machines_are_those_of_one(variant: str, size: int, rules: Rules) -> None:
    drafter = dialled(variant, rules=rules)
    alone = written(Pair(target(variant), drafter), rules)
    meeting = Meeting(size)

    def work(rank: int) -> list[int]:
        model = target(variant)
        share(model, meeting.part(rank), "it")
        return written(Pair(model, drafter, agreed=Seat(meeting=meeting, place=rank)), rules)

    assert meeting.run(work) == [alone] * size
    assert rules.drafts != "coupled" or {-1, -2, -3} & {*alone} > {-1}, "drafts that are kept, and some that are not"


def mistaken(meeting: Meeting, rank: int, rules: Rules = GREEDY) -> Pair:
    """Machines that need each other, of which the second one misreads what they compute and drafts something else."""
    model = target("qwen3_5_moe")
    share(model, meeting.part(rank), "it")
    seen = AlteredTarget(model, factor=-0.5 if rank else 1.0)
    return Pair(seen, dialled("qwen3_5_moe", rank, rules), agreed=Seat(meeting=meeting, place=rank))


@pytest.mark.parametrize("chooser", [*RULES, Callables(Greedy())], ids=["greedy", "seeded", "rejection", "callable"])
def test_machines_that_see_other_numbers_follow_rank_0(chooser: Rules | Callables) -> None:
    alone = written(Pair(target("qwen3_5_moe"), dialled("qwen3_5_moe", 0, chooser.rules)), chooser)
    meeting = Meeting(2)
    assert meeting.run(lambda rank: written(mistaken(meeting, rank, chooser.rules), chooser)) == [alone] * 2


@dataclass
class Anything:
    """A grammar that allows everything, but has the host look at every draft."""

    free: bool = False

    def masks(self, drafts: list[int]) -> mx.array:
        return mx.full((1, len(drafts) + 1, 10), 2**32 - 1, mx.uint32)

    def advance(self, tokens: list[int]) -> None:
        """Nothing to remember."""


def test_machines_follow_rank_0_where_a_grammar_looks_at_drafts() -> None:
    alone = written(Pair(target("qwen3_5_moe"), dialled("qwen3_5_moe")), Rules())
    meeting, anything = Meeting(2), cast(GrammarState, Anything())
    found = meeting.run(lambda rank: written(mistaken(meeting, rank), Rules(), grammar=anything))
    assert found == [alone] * 2


def test_machines_that_are_asked_for_other_texts_write_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their prompts, predictions, seeds and the memory that is left differ."""
    meeting, mine = Meeting(2), local()
    monkeypatch.setattr(generation, "admit", lambda *_, **__: Admission(12 + 8 * mine.rank, 0, 0))
    monkeypatch.setattr(generation, "draw_seed", lambda: 10 + mine.rank)
    _, tokenizer = load(FIXTURES / "qwen3_5_moe", dtype=mx.float32)

    def text(pair: Pair, rank: int) -> list[int]:
        mine.rank = rank
        prompt, predicted = PROMPT[rank:], [PROMPT[-1:] + plainly[:3] + [5], [5]][rank]
        written = stream_generate(pair, tokenizer, prompt, -1, depth=2, sampler=Sample(0.5), prediction=predicted)
        return [response.token for response in written]

    plainly = plain(target("qwen3_5_moe"), PROMPT, 3)
    alone = text(Pair(target("qwen3_5_moe"), dialled("qwen3_5_moe")), 0)
    assert meeting.run(lambda rank: text(mistaken(meeting, rank), rank)) == [alone] * 2
    assert len(alone) == 12


@pytest.mark.parametrize(
    "ways",
    [
        [{"depth": 2}, {"depth": 0}],
        [{"prefill_step_size": 8}, {"prefill_step_size": 3}],
        [{"max_tokens": 6}, {"max_tokens": 7}],
        [{"sampler": Sample(0.5)}, {"sampler": Greedy()}],
        [{"seed": 1}, {}],
        [{}, {"prompt": ""}],
        [{}, {"prompt_cache": []}],
    ],
    ids=lambda ways: ",".join({**ways[0], **ways[1]}),
)
def test_machines_that_are_asked_in_other_ways_write_nothing_and_keep_step(ways: list[dict[str, Any]]) -> None:
    """As far as the next text: a program may go on after an error."""
    meeting = Meeting(2)
    _, tokenizer = load(FIXTURES / "qwen3_5_moe", dtype=mx.float32)

    def texts(rank: int) -> list[int]:
        pair = mistaken(meeting, rank)
        with pytest.raises(RequestError):
            list(stream_generate(pair, tokenizer, **{"prompt": PROMPT, "max_tokens": 5, "depth": 1, **ways[rank]}))
        return [response.token for response in stream_generate(pair, tokenizer, PROMPT, 5, depth=1)]

    first, second = meeting.run(texts)
    assert first == second == plain(target("qwen3_5_moe"), PROMPT, 5)


def test_machines_measure_depths_by_one_clock() -> None:
    meeting = Meeting(2)

    def work(rank: int) -> list[float]:
        seen: list[float] = []

        class Watching(Fixed):
            def observe(self, *outcomes: Outcome) -> None:
                seen.append(outcomes[0].seconds)

        pair = Pair(target("qwen3_5_moe"), dialled("qwen3_5_moe"), agreed=Seat(meeting=meeting, place=rank))
        sequence = Sequence(pair, Rules(), 3)
        sequence.prefill(PROMPT, 16, lambda done, total: None)
        for _ in rounds(sequence, Watching(2), 8):
            time.sleep(0.01 * rank)
        return seen

    first, second = meeting.run(work)
    assert first == second and all(seconds > 0 for seconds in first)


# --------------------------------------------------------------------------- processes, joined by MLX's ring


def quantised(folder: Path) -> Path:
    """A Gemma with 4-bit matrices, and its assistant."""
    shutil.copytree(FIXTURES / "gemma4_keqv", folder)
    shutil.rmtree(folder / "assistant_ordered")
    model: nn.Module = target("gemma4_keqv", (32, 4, "affine"))
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), parameters, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def alone(folder: Path, tokens: int) -> list[list[int]]:
    """What one machine writes with all options but the last, which know no seed."""
    pair, tokenizer = load(folder, dtype=mx.float32)
    return [
        [response.token for response in stream_generate(pair, tokenizer, [7, 8, 9], tokens, **options)]
        for options in OPTIONS[:-1]
    ]


def ended(processes: list[subprocess.Popen[str]], seconds: float = 120.0) -> list[tuple[str, str]]:
    """What processes have printed, each on stdout and stderr."""
    try:
        return [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


MACHINE = str(Path(__file__).parent / "machines.py")


@pytest.mark.xdist_group("machines")
def test_processes_write_what_one_writes_and_end_when_one_hangs(tmp_path: Path) -> None:
    folders = [quantised(tmp_path / "pair"), FIXTURES / "qwen3_5_moe"]
    first, second = start(2, tmp_path, MACHINE, "8", "halt", *map(str, folders))
    (out, err), told = ended([first])[0], json.loads(second.stdout.readline() if second.stdout else "")
    second.kill()
    second.communicate()
    assert first.returncode == 1
    assert "rank 0 of 2 has waited 2 s for the others" in err
    assert json.loads(out) == told
    for folder, pair in zip(folders, told, strict=True):
        assert pair["texts"][:-1] == alone(folder, 8)
        drawn = pair["texts"][-1]  # by chance, so that it may end by itself
        assert len(drawn) == 8 or (drawn and drawn[-1] in load_tokenizer(folder).eos_token_ids)


@pytest.mark.xdist_group("machines")
def test_four_processes_write_what_one_writes_and_notice_strangers(tmp_path: Path) -> None:
    folders = [FIXTURES / "qwen3_5_moe", quantised(tmp_path / "pair")]
    processes = start(4, tmp_path, MACHINE, "3", "compare", *map(str, folders))
    told = [json.loads(out) for out, _ in ended(processes)]
    assert [process.returncode for process in processes] == [0] * 4
    for number, folder in enumerate(folders):
        pairs = [each[number] for each in told]
        assert all(pair["texts"] == pairs[0]["texts"] for pair in pairs)
        assert pairs[0]["texts"][:-1] == alone(folder, 3)
        assert sum(pair["held"] for pair in pairs) > pairs[0]["whole"] > max(pair["held"] for pair in pairs)
    assert all("rank 3 has loaded something else than rank 0; give all 4 machines" in each[-1] for each in told)


@pytest.mark.xdist_group("machines")
def test_a_killed_process_ends_the_others_with_a_message(tmp_path: Path) -> None:
    generate = ["-c", "from mtp_mlx.cli.main import main; main()", "generate", "def f(x):", "-m", "400"]
    first, second = start(2, tmp_path, *generate, "--backend", "ring")
    assert first.stdout and first.stdout.read(1)
    second.send_signal(signal.SIGKILL)
    (_, err), (silent, _) = ended([first, second])
    assert first.returncode == 1 and silent == ""
    assert "mtp-mlx: rank 0 of 2 has lost another machine of its group ([ring] connection to a peer was lost)" in err
