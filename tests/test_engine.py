"""Several requests share a pair in slices: none gets another's text, a short one does not wait, a reader may leave."""

import threading
import time
from collections.abc import Iterator

import mlx.core as mx
import pytest
from conftest import FIXTURES, varied_tokens
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx import engine as module
from mtp_mlx.engine import Engine, Piece, Request, Stream
from mtp_mlx.errors import BusyError, RequestError
from mtp_mlx.generate import Progress, stream_generate
from mtp_mlx.loading import load
from mtp_mlx.sampling import Sample
from mtp_mlx.types import Pair

Loaded = tuple[Pair, TokenizerWrapper]


@pytest.fixture(params=["gemma4_keqv", "qwen3_5_tied"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return load(FIXTURES / request.param, dtype=mx.float32)


@pytest.fixture
def engine(loaded: Loaded) -> Iterator[Engine]:
    served = Engine(*loaded)
    yield served
    served.close(10)


def tokens_of(stream: Stream) -> list[int]:
    return [token for event in stream if isinstance(event, Piece) for token in event.tokens]


def alone(loaded: Loaded, request: Request) -> list[int]:
    return [r.token for r in stream_generate(*loaded, request.prompt, request.max_tokens, **request.options)]


def test_requests_at_a_time_get_what_each_gets_alone(loaded: Loaded, engine: Engine) -> None:
    requests = [
        Request(varied_tokens(40 * i + 1, seed=i), 20 + i, options={"depth": i % 4, "seed": i, "sampler": sampler})
        for i, sampler in enumerate([None, Sample(1.0), Sample(0.7, top_p=0.9), None, Sample(1.2), None])
    ]
    streams = [engine.stream(request) for request in requests]
    found: dict[int, list[int]] = {}
    readers = [threading.Thread(target=lambda i=i, s=s: found.update({i: tokens_of(s)})) for i, s in enumerate(streams)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [found[i] for i in range(len(requests))] == [alone(loaded, request) for request in requests]


def test_a_short_request_does_not_wait_for_a_long_prompt(engine: Engine) -> None:
    long = engine.stream(Request(varied_tokens(1000), 5, options={"prefill_step_size": 20, "depth": 0}))
    assert next(long) == Progress(0, 1000) and isinstance(next(long), Progress)
    before = long._job.events.qsize()
    short = engine.stream(Request(varied_tokens(5), 3, options={"depth": 0}))
    assert next(event for event in short if isinstance(event, Piece)).tokens
    # Two slices of the other's come between its own two, and one was under way when it came.
    assert long._job.events.qsize() - before <= 3
    assert [event.finish_reason for event in short if isinstance(event, Piece)][-1] == "length"
    long.close()


def test_whoever_stops_reading_frees_the_engine(engine: Engine) -> None:
    streams = [
        engine.stream(Request(varied_tokens(30, seed=i), 900, options={"depth": 0})) for i in range(module.SLOTS)
    ]
    for stream in streams:
        next(event for event in stream if isinstance(event, Piece))
    streams[0].close()
    assert list(streams[0]) == []
    del streams, stream
    deadline = time.monotonic() + 10
    while engine._live and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine._live, "a request that nobody reads is still worked on"


def test_a_slow_reader_rests_its_own_request_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD", 8)
    slow = engine.stream(Request(varied_tokens(10), 200, options={"depth": 0}))
    quick = engine.stream(Request(varied_tokens(20), 40, options={"depth": 0}))
    assert len(tokens_of(quick)) == 40
    assert slow._job.events.qsize() <= 8 + module.ROUNDS
    assert len(tokens_of(slow)) == 200


def test_a_stop_text_ends_the_output_wherever_it_begins(loaded: Loaded, engine: Engine) -> None:
    prompt = varied_tokens(25)
    text = "".join(r.text for r in stream_generate(*loaded, prompt, 60, depth=3, seed=0))
    for begin, end in ((len(text) // 3, len(text) // 3 + 3), (len(text) // 2, len(text) // 2 + 5)):
        stop = text[begin:end]
        pieces = list(engine.stream(Request(prompt, 60, (stop, "never in there"), {"depth": 3, "seed": 0})))
        written = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
        assert written == text[: text.index(stop)]
        assert isinstance(pieces[-1], Piece) and pieces[-1].finish_reason == "stop"


def test_errors_reach_the_one_who_asked_and_nobody_else(loaded: Loaded, engine: Engine) -> None:
    good = engine.stream(Request(varied_tokens(9), 30, options={"depth": 2}))
    with pytest.raises(RequestError, match="prompt is empty"):
        list(engine.stream(Request([], 5)))
    with pytest.raises(TypeError):
        list(engine.stream(Request([5], 5, options={"sampler": 7, "depth": 0})))
    assert tokens_of(good) == alone(loaded, Request(varied_tokens(9), 30, options={"depth": 2}))
    assert len(tokens_of(engine.stream(Request([5], 5)))) == 5, "the engine is alive"


def test_too_many_are_refused_and_a_closed_engine_says_so(loaded: Loaded) -> None:
    served = Engine(*loaded, slots=1, waiting=1)
    running = served.stream(Request(varied_tokens(900), 50, options={"prefill_step_size": 10}))
    next(running)
    held = served.stream(Request(varied_tokens(9), 5))
    with pytest.raises(BusyError, match="1 requests wait already"):
        served.stream(Request(varied_tokens(9), 5))
    served.close(10)
    with pytest.raises(BusyError, match="closed"):
        list(held)
    with pytest.raises(BusyError, match="closed"):
        list(running)
    with pytest.raises(BusyError, match="closed"):
        served.stream(Request([5], 5))
