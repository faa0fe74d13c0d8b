"""The comparison a user runs on their own machine: what it counts, what it says, what it writes."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import FIXTURES, program, tiny_pair

import mtp_mlx
from mtp_mlx.bench import (
    Acceptance,
    Arm,
    Comparison,
    Costs,
    Result,
    Text,
    compare,
    costs,
    machine,
    ours,
    peer,
    peer_model,
)
from mtp_mlx.cli.bench import command, picture
from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.hub import find
from mtp_mlx.stats import Stats
from mtp_mlx.types import Pair


def result(arm: str, speed: float, depth: int = 0, tokens: tuple[int, ...] = (1, 2, 3)) -> Result:
    """An arm that wrote one text at so many tokens per second."""
    rounds = ((0, 0), (depth, min(depth, 1))) if arm != "mlx-lm" else ()
    stats = Stats(5, depth=depth, depth_reason="because") if arm != "mlx-lm" else None
    return Result(arm, ((Text(tokens, 2, 2 / speed, 0.1, 1000, rounds, stats),),))


def comparison(peer: float, plain: float, two: float, auto: float, chosen: int = 2) -> Comparison:
    results = [result("mlx-lm", peer), result("depth 0", plain), result("depth 2", two, 2)]
    results.append(result("depth auto", auto, chosen))
    return Comparison({r.arm: r for r in results}, Costs({1: 0.01, 3: 0.02}, {2: 0.022}))


def test_the_command_writes_table_figures_and_picture(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    done = program("bench", "--quick", "--tokens", "12", "--out", str(out))
    assert done.returncode == 0, done.stderr
    for arm in ("mlx-lm", "depth 0", "depth 2", "depth auto"):
        assert arm in done.stdout and arm in done.stderr
    figures = json.loads((out / "bench.json").read_text())
    assert figures["verdict"] == done.stdout.splitlines()[-1]
    assert figures["settings"]["tokens"] == 12 and figures["other_text_than_depth_0"] == []
    assert figures["arms"]["depth 2"].keys() >= {"tokens_per_second", "bound", "reached", "accepted_if_reached"}
    assert figures["arms"]["depth 2"]["same_text_as_mlx_lm"] is True
    assert figures["costs"]["rows"].keys() == {"1", "3"}
    ElementTree.parse(out / "bench.svg")


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (comparison(10, 9, 19, 18), "1.90x over mlx-lm on this machine; depth 2; auto uses depth 2 and runs at 1.80x"),
        (comparison(9, 10, 19, 18), "1.90x over plain decoding on this machine; depth 2"),
        (
            comparison(10, 10, 8, 10, chosen=0),
            "drafting does not pay here: a round with 2 drafts costs 2.2 plain steps and brings 2.0 tokens, "
            "0.80x mlx-lm; auto uses depth 0 and runs at 1.00x",
        ),
        (comparison(10, 10, 10.2, 10, chosen=0), "drafting does not pay here"),
    ],
)
def test_the_verdict_compares_with_the_fastest_plain_decoder(figures: Comparison, words: str) -> None:
    assert figures.verdict().startswith(words)


def test_the_verdict_without_a_drafter_or_without_mlx_lm() -> None:
    plain = {"depth 0": result("depth 0", 10), "depth auto": result("depth auto", 10)}
    words = "there is no drafter, so nothing to gain over plain decoding; auto uses depth 0 and runs at 1.00x"
    assert Comparison(plain, Costs({1: 0.01}, {})).verdict() == words


def test_an_arm_that_writes_another_text_is_named() -> None:
    results = {r.arm: r for r in (result("depth 0", 10), result("depth 2", 10, 2, tokens=(1, 2, 4)))}
    assert Comparison(results, Costs({1: 0.01, 3: 0.02}, {2: 0.02})).strangers() == ["depth 2"]


def test_bound_and_share_of_it() -> None:
    costs = Costs({1: 0.010, 2: 0.012, 4: 0.014}, {1: 0.0125, 3: 0.0155})
    assert costs.rows(4) == pytest.approx(1.4) and costs.draft_step == pytest.approx(0.05)
    assert costs.bound(3, 3.1) == pytest.approx(3.1 / 1.55)
    figures = comparison(10, 10, 15, 15).figures()["arms"]["depth 2"]
    assert figures["bound"] == pytest.approx(2.0 / 2.2, abs=1e-3)
    assert figures["reached"] == pytest.approx(1.5 / (2.0 / 2.2), abs=1e-2)


def test_acceptance_counts_all_drafts_and_those_that_were_reached() -> None:
    counted = Acceptance.of([(3, 3), (3, 1), (3, 0), (1, 1), (0, 0)])
    assert counted == Acceptance(made=(4, 3, 3), reached=(4, 2, 1), kept=(3, 1, 1))
    assert counted.figures() == {
        "accepted_per_position": [0.75, 0.333, 0.333],
        "accepted_if_reached": [0.75, 0.5, 1.0],
    }
    assert Acceptance.of([]).figures() == {"accepted_per_position": [], "accepted_if_reached": []}


def test_a_text_knows_its_rounds_and_times_only_what_follows_the_first() -> None:
    loaded, tokenizer = mtp_mlx.load("demo-qwen")
    pair = loaded.pair
    text = ours(pair, tokenizer, 3, 24).write(tokenizer.encode("def test_push(self):\n"), 0)
    assert text.stats is not None and len(text.tokens) == text.stats.generation_tokens
    assert len(text.rounds) == text.stats.rounds
    assert sum(accepted + 1 for _, accepted in text.rounds) == len(text.tokens)
    assert text.timed == len(text.tokens) - text.rounds[0][1] - 1
    assert min(text.seconds, text.ttft_seconds, text.peak) > 0


def test_one_seed_writes_one_text_at_every_depth() -> None:
    loaded, tokenizer = mtp_mlx.load("demo")
    pair = loaded.pair
    prompt = tokenizer.encode("import os\n")
    arms = [ours(pair, tokenizer, depth, 16, temperature=0.8) for depth in (0, 2)]
    assert len({arm.write(prompt, seed).tokens for arm in arms for seed in (1, 2)}) == 2


def test_arms_alternate_and_the_first_repeat_is_not_counted() -> None:
    calls: list[tuple[str, int]] = []

    def arm(name: str) -> Arm:
        def write(prompt: list[int], seed: int) -> Text:
            calls.append((name, seed))
            return Text((len(calls), 2), timed=1, seconds=0.5, ttft_seconds=0.1)

        return Arm(name, write)

    lines: list[str] = []
    results = compare([arm("a"), arm("b")], [[1], [2]], 2, lines.append)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3
    assert [text.tokens[0] for text in results["a"].texts] == [5, 6, 9, 10]
    assert results["a"].speeds == [2.0, 2.0] and len(lines) == 6
    assert not results["a"].wrote_as(results["b"])


def test_texts_that_end_at_once_cannot_be_timed() -> None:
    silent = Arm("silent", lambda prompt, seed: Text((1,), timed=0, seconds=0.0, ttft_seconds=0.1))
    with pytest.raises(RequestError, match="silent ends every text within its first round"):
        compare([silent], [[1]], 1, lambda line: None)


def test_mlx_lm_decodes_from_the_same_arrays() -> None:
    loaded, tokenizer = mtp_mlx.load("demo")
    pair = loaded.pair
    held = mx.get_active_memory()
    theirs = peer_model(find("demo"), pair.target)
    assert mx.get_active_memory() - held < 0.1 * pair.target.nbytes
    prompt = tokenizer.encode("import os\n")
    text = peer(theirs, tokenizer, 12).write(prompt, 0)
    assert text.tokens == ours(pair, tokenizer, 0, 12).write(prompt, 0).tokens
    assert (text.timed, text.rounds, text.stats) == (11, (), None)
    with pytest.raises(CheckpointError, match="mlx-lm cannot load"):
        peer_model(FIXTURES, pair.target)


def test_costs_are_those_of_rounds_with_and_without_the_drafter() -> None:
    found = costs(Pair(*tiny_pair("qwen3_5_dense")), [5, 6, 7], depths=[0, 2], widths=[1, 3], repeats=1)
    assert found.verify.keys() == {1, 3} and found.whole.keys() == {2}
    assert all(seconds > 0 for seconds in (*found.verify.values(), *found.whole.values()))


def test_the_machine_says_what_decides_the_speed() -> None:
    assert machine().keys() >= {"processor", "device", "mlx", "mlx-lm", "preloaded_blas", "compiles"}


def test_a_title_may_hold_anything() -> None:
    root = ElementTree.fromstring(picture(comparison(10, 9, 19, 18), "<a> & b"))
    assert any(element.text == "<a> & b" for element in root.iter())


def test_bad_options_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RequestError, match="--repeats 0 must be at least 1"):
        command(model="nowhere", repeats=0, out=tmp_path)
    with pytest.raises(RequestError, match="--tokens 1 leaves nothing to time"):
        command(model="nowhere", tokens=1, out=tmp_path)
    with pytest.raises(RequestError, match="--quick means one repeat, and --repeats 5 is given too"):
        command(model="nowhere", repeats=5, quick=True, out=tmp_path)
    with pytest.raises(RequestError, match="nothing can be written to the folder --out"):
        command(model="nowhere", out=file / "folder")
    with pytest.raises(CheckpointError):
        command(model=str(tmp_path), out=tmp_path)
