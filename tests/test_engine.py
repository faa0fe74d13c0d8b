"""Several requests share a pair in slices: none gets another's text, a short one does not wait, a reader may leave."""

import gc
import itertools
import json
import re
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import mlx.core as mx
import pytest
from conftest import FIXTURES, AlteredTarget, varied_tokens
from mlx_lm.tokenizer_utils import TokenizerWrapper
from served import Says
from talks import BRACES, MARKERS, TAGS, WEATHER, answer, call, result, system, tokenizer, user
from test_conversation import CALLS

from mtp_mlx import engine as module
from mtp_mlx import memory
from mtp_mlx.conversation import Conversations, Talk
from mtp_mlx.dialects import find_dialect
from mtp_mlx.engine import Engine, Event, Piece, Request, Stream
from mtp_mlx.errors import BusyError, MTPError, RequestError
from mtp_mlx.generation import Progress, Response, generation, solo
from mtp_mlx.grammar import Grammar, Guide
from mtp_mlx.loading import load
from mtp_mlx.options import Options
from mtp_mlx.penalties import Penalties
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.programs import Programs
from mtp_mlx.sampling import Sample
from mtp_mlx.sequence import Sequence
from mtp_mlx.store import Store
from mtp_mlx.types import Pair

Loaded = tuple[Pair, TokenizerWrapper]


@pytest.fixture(params=["gemma4_keqv", "qwen3_5_tied"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    model, tokenizer = load(FIXTURES / request.param, dtype=mx.float32)
    return model.pair, tokenizer


@pytest.fixture
def engine(loaded: Loaded) -> Iterator[Engine]:
    served = Engine(*loaded)
    yield served
    served.close(10)


def tokens_of(stream: Stream) -> list[int]:
    return [token.id for event in stream if isinstance(event, Piece) for token in event.tokens]


def alone(loaded: Loaded, request: Request) -> list[Response]:
    events = solo(generation(*loaded, request.prompt, request.options))
    return [response for event in events if isinstance(event, list) for response in event]


def ids(responses: list[Response]) -> list[int]:
    return [response.token for response in responses]


def test_requests_at_a_time_get_what_each_gets_alone(loaded: Loaded, engine: Engine) -> None:
    requests = [
        Request(varied_tokens(40 * i + 1, seed=i), Options(20 + i, i % 4, sampler, seed=i))
        for i, sampler in enumerate([None, Sample(1.0), Sample(0.7, top_p=0.9), None, Sample(1.2), None])
    ]
    streams = [engine.stream(request) for request in requests]
    found: dict[int, list[int]] = {}
    readers = [threading.Thread(target=lambda i=i, s=s: found.update({i: tokens_of(s)})) for i, s in enumerate(streams)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [found[i] for i in range(len(requests))] == [ids(alone(loaded, request)) for request in requests]


def test_texts_are_written_together_and_each_ends_as_if_it_were_alone(loaded: Loaded, sizes: list[int]) -> None:
    """A stop text, a reader that leaves, a fault and an end of its own, in one batch; and what each leaves is right."""

    def faulty(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > 60:
            raise ZeroDivisionError
        return logits

    pair, tokenizer = loaded
    served = Engine(pair, tokenizer, Prefixes(pair, 10**9, near=1))
    requests = [
        Request(varied_tokens(40 + i, seed=i), Options(tokens, 3, sampler, logits_processors=processors, seed=i))
        for i, (tokens, sampler, processors) in enumerate(
            [(30, None, None), (400, Sample(0.8), None), (90, None, [faulty]), (70, Sample(1.0), None)]
        )
    ]
    truth = {row: alone(loaded, requests[row]) for row in (0, 3)}
    text = "".join(response.text for response in truth[3])
    stop = text[len(text) // 2 :][:4]
    requests[3] = replace(requests[3], stop=(stop,))
    streams = [served.stream(request) for request in requests]
    with pytest.raises(ZeroDivisionError):
        list(streams[2])
    assert tokens_of(streams[0]) == ids(truth[0])
    streams[1].close()
    said = "".join(event.text for event in streams[3] if isinstance(event, Piece))
    assert said == text[: text.index(stop)]
    assert max(sizes) == 4 and sizes.count(2) + sizes.count(3) > 0
    following = replace(requests[0], prompt=[*requests[0].prompt, *ids(truth[0]), *varied_tokens(9, seed=9)])
    events = list(served.stream(following))
    assert isinstance(events[0], Progress) and events[0].cached >= 68, "what it left in the batch is not read again"
    assert [t.id for e in events if isinstance(e, Piece) for t in e.tokens] == ids(alone(loaded, following))
    served.close(10)


def test_a_short_request_does_not_wait_for_a_long_prompt(engine: Engine) -> None:
    long = engine.stream(Request(varied_tokens(1000), Options(5, 0, prefill_step_size=20)))
    assert next(long) == Progress(0, 1000) and isinstance(next(long), Progress)
    before = long._job.events.qsize()
    short = engine.stream(Request(varied_tokens(5), Options(3, 0)))
    assert next(event for event in short if isinstance(event, Piece)).tokens
    # Two slices of the other's come between its own two, and one was under way when it came.
    assert long._job.events.qsize() - before <= 3
    assert [event.finish_reason for event in short if isinstance(event, Piece)][-1] == "length"
    long.close()


def test_whoever_stops_reading_frees_the_engine(engine: Engine) -> None:
    streams = [engine.stream(Request(varied_tokens(30, seed=i), Options(900, 0))) for i in range(module.SLOTS)]
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
    slow = engine.stream(Request(varied_tokens(10), Options(200, 0)))
    quick = engine.stream(Request(varied_tokens(20), Options(40, 0)))
    assert len(tokens_of(quick)) == 40
    assert slow._job.events.qsize() <= 8 + module.ROUNDS
    assert len(tokens_of(slow)) == 200


def test_a_reader_that_catches_up_while_its_company_is_gathered_does_no_harm(
    loaded: Loaded, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a request rests may change at any moment, on the reader's thread."""
    answers = itertools.cycle([True, False, False])
    monkeypatch.setattr(module._Job, "rests", property(lambda job: next(answers)))
    requests = [Request(varied_tokens(9, seed=row), Options(30, 2, seed=row)) for row in range(4)]
    streams = [engine.stream(request) for request in requests]
    assert [tokens_of(stream) for stream in streams] == [ids(alone(loaded, request)) for request in requests]


def test_a_stop_text_ends_the_output_wherever_it_begins(loaded: Loaded, engine: Engine) -> None:
    prompt = varied_tokens(25)
    options = Options(60, 3, seed=0)
    text = "".join(response.text for response in alone(loaded, Request(prompt, options)))
    for begin, end in ((len(text) // 3, len(text) // 3 + 3), (len(text) // 2, len(text) // 2 + 5)):
        stop = text[begin:end]
        pieces = list(engine.stream(Request(prompt, options, (stop, "never in there"))))
        written = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
        assert written == text[: text.index(stop)]
        assert isinstance(pieces[-1], Piece) and (pieces[-1].finish_reason, pieces[-1].stop) == ("stop", stop)


def test_errors_reach_the_one_who_asked_and_nobody_else(loaded: Loaded, engine: Engine) -> None:
    asked = Request(varied_tokens(9), Options(30, 2))
    good = engine.stream(asked)
    with pytest.raises(RequestError, match="prompt is empty"):
        list(engine.stream(Request([])))
    with pytest.raises(TypeError):
        list(engine.stream(Request([5], Options(5, 0, cast(Any, 7)))))
    assert tokens_of(good) == ids(alone(loaded, asked))
    assert len(tokens_of(engine.stream(Request([5], Options(5))))) == 5, "the engine is alive"


def test_too_many_are_refused_and_a_closed_engine_says_so(loaded: Loaded) -> None:
    served = Engine(*loaded, slots=1, waiting=1)
    running = served.stream(Request(varied_tokens(900), Options(50, prefill_step_size=10)))
    next(running)
    held = served.stream(Request(varied_tokens(9)))
    with pytest.raises(BusyError, match="1 requests wait already"):
        served.stream(Request(varied_tokens(9)))
    served.close(10)
    with pytest.raises(BusyError, match="closed"):
        list(held)
    with pytest.raises(BusyError, match="closed"):
        list(running)
    with pytest.raises(BusyError, match="closed"):
        served.stream(Request([5]))


def test_those_who_have_left_do_not_hold_a_place_in_the_queue(loaded: Loaded) -> None:
    served = Engine(*loaded, slots=1, waiting=1)
    running = served.stream(Request(varied_tokens(900), Options(5, prefill_step_size=10)))
    next(running)
    left = served.stream(Request(varied_tokens(9)))
    assert served.load == (1, 1)
    left.close()
    assert len(tokens_of(served.stream(Request(varied_tokens(9), Options(4, 0))))) == 4
    served.close(10)


def test_tokens_tell_their_text_their_origin_and_what_else_was_probable(loaded: Loaded, engine: Engine) -> None:
    request = Request(varied_tokens(25), Options(20, 3, Sample(0.8), seed=2), top_logprobs=4)
    expected = alone(loaded, request)
    pieces = [piece for piece in engine.stream(request) if isinstance(piece, Piece)]
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [(t.id, t.text, t.origin) for t in tokens] == [(r.token, r.text, r.origin) for r in expected]
    for token, response in zip(tokens, expected, strict=True):
        row = response.logprobs
        assert token.logprob == row[token.id].item()
        assert [value for _, value in token.top] == mx.sort(-row)[:4].__neg__().tolist()
        assert [row[other].item() for other, _ in token.top] == [value for _, value in token.top]
    none = next(piece for piece in engine.stream(Request([5], Options(1), top_logprobs=0)) if isinstance(piece, Piece))
    assert none.tokens[0].logprob is not None and none.tokens[0].top == ()


def test_tokens_before_a_stop_text_come_whole_and_the_one_it_begins_in_is_cut(loaded: Loaded, engine: Engine) -> None:
    request = Request(varied_tokens(25), Options(60, 3, Sample(1.0), seed=0))
    expected = alone(loaded, request)
    whole = next(i for i in range(10, 50) if len(expected[i].text) > 1 and expected[i].text.isascii())
    before = "".join(response.text for response in expected[:whole])
    stop = expected[whole].text[1:] + "".join(response.text for response in expected[whole + 1 :])[:6]
    assert stop not in before + expected[whole].text[:1]
    tokens = [
        t for piece in engine.stream(replace(request, stop=(stop,))) if isinstance(piece, Piece) for t in piece.tokens
    ]
    assert [token.id for token in tokens] == ids(expected)[: whole + 1]
    assert [token.text for token in tokens] == [r.text for r in expected[:whole]] + [expected[whole].text[:1]]


def test_a_next_turn_reads_only_what_is_new(loaded: Loaded) -> None:
    pair, tokenizer = loaded
    served = Engine(pair, tokenizer, Prefixes(pair, 10**9, near=1))
    first = Request(varied_tokens(300), Options(20, 3, seed=1), marks=(290,))
    written = tokens_of(served.stream(first))
    assert written == ids(alone(loaded, first))
    second = replace(first, prompt=[*first.prompt, *written, *varied_tokens(30, seed=7)])
    events = list(served.stream(second))
    assert isinstance(events[0], Progress) and events[0].cached >= 318, "all but what was written last"
    found = [t.id for piece in events if isinstance(piece, Piece) for t in piece.tokens]
    assert found == ids(alone(loaded, second)), "as if it had been read anew"
    again = list(served.stream(replace(first, prompt=[*first.prompt[:290], *varied_tokens(9, seed=8)])))
    assert isinstance(again[0], Progress) and again[0].cached == 290, "another message at the mark"
    assert isinstance(again[-1], Piece) and again[-1].stats.cached_tokens == 290
    deadline = time.monotonic() + 10
    while served.usage and served.usage.texts < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.usage and (served.usage.texts, served.usage.hits) == (3, 2)
    served.close(10)


def test_what_was_read_is_written_to_disk_while_nobody_asks_and_found_after_a_restart(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED", 0.01)
    pair, tokenizer = loaded
    request = Request(varied_tokens(300), Options(10, 3, seed=1))

    def serve(ask: Request) -> list[Event]:
        store = Store.open(tmp_path, "one", 10**9)
        assert store is not None
        served = Engine(pair, tokenizer, Prefixes(pair, 10**9, near=1, store=store))
        events = list(served.stream(ask))
        served.close(10)
        return events

    first = serve(request)
    assert [path.suffix for path in tmp_path.rglob("*") if path.suffix == ".safetensors"], "nothing was written"
    second = serve(request)
    assert isinstance(second[0], Progress) and second[0].cached == 299
    assert [e.tokens for e in second if isinstance(e, Piece)] == [e.tokens for e in first if isinstance(e, Piece)]


def test_a_prompt_that_was_broken_off_goes_on_where_it_was(loaded: Loaded) -> None:
    pair, tokenizer = loaded
    served = Engine(pair, tokenizer, Prefixes(pair, 10**9, near=1))
    request = Request(varied_tokens(900), Options(5, 0, prefill_step_size=10))
    left = served.stream(request)
    next(event for event in left if isinstance(event, Progress) and event.done >= 100)
    left.close()
    events = list(served.stream(request))
    assert isinstance(events[0], Progress) and 100 <= events[0].cached < 899
    assert [t.id for piece in events if isinstance(piece, Piece) for t in piece.tokens] == ids(alone(loaded, request))
    served.close(10)


def test_two_texts_at_a_time_do_not_share_what_one_measures(loaded: Loaded) -> None:
    texts = [solo(generation(*loaded, varied_tokens(30, seed=i), Options(40))) for i in range(2)]
    for text in (*texts, *texts):
        next(text)
    policies = loaded[0].measured["auto"]
    assert len(policies) == 2 and all(measured.busy for measured in policies)
    assert policies[0].policy is not policies[1].policy
    for text in texts:
        text.close()
    list(solo(generation(*loaded, varied_tokens(30), Options(5))))
    assert len(policies) == 2 and not any(measured.busy for measured in policies), "a later text takes one of them"


def test_a_grammar_binds_the_answer_at_every_depth(loaded: Loaded, engine: Engine) -> None:
    pair, tokenizer = loaded
    stops = frozenset(tokenizer.eos_token_ids)
    guide = Guide.of(tokenizer, pair.target.vocabulary, stops, find_dialect(tokenizer.get_vocab()))
    grammar = Grammar.json_schema(guide, {"type": "array", "items": {"enum": ["alpha", "beta"]}, "maxItems": 3})
    for depth in (0, 3, "auto"):
        request = Request(varied_tokens(30), Options(60, depth, Sample(1.0), seed=4, grammar=grammar))
        pieces = [piece for piece in engine.stream(request) if isinstance(piece, Piece)]
        assert set(json.loads("".join(piece.text for piece in pieces))) <= {"alpha", "beta"}
        assert pieces[-1].finish_reason == "stop"
        assert [token.id for piece in pieces for token in piece.tokens] == ids(alone(loaded, request))


def test_a_request_in_the_queue_is_served_once_while_others_join_it(loaded: Loaded) -> None:
    served = Engine(*loaded, slots=1)
    running = served.stream(Request(varied_tokens(900), Options(900, 0, prefill_step_size=10)))
    next(running)
    held = served.stream(Request(varied_tokens(9), Options(5, 0)))

    class Slow(threading.Event):
        def is_set(self) -> bool:  # asked by one who joins the queue: long enough for the engine to take the request
            if threading.current_thread() is threading.main_thread():
                running.close()
                time.sleep(0.2)
            return super().is_set()

    held._job.cancelled = Slow()
    joined = served.stream(Request(varied_tokens(7), Options(5, 0)))
    assert len(tokens_of(held)) == len(tokens_of(joined)) == 5
    assert held.get(0.05) is None and held._job.events.empty()
    served.close(10)


def test_faults_around_a_request_do_not_end_the_engine(loaded: Loaded, engine: Engine) -> None:
    def complain() -> None:
        raise RuntimeError("nobody listens")

    asked = Request(varied_tokens(9), Options(5, 0))
    heard = engine.stream(asked)
    heard.watch(complain)
    assert len(tokens_of(heard)) == 5
    assert len(tokens_of(engine.stream(asked))) == 5


def test_who_has_left_or_failed_holds_no_buffers(loaded: Loaded, engine: Engine) -> None:
    """At once, without the garbage collector, and even where the stream is kept; nor do those who were beside him."""

    def faulty(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > 40:
            raise ZeroDivisionError
        return logits

    begun = weakref.WeakSet[Sequence]()

    def opened(self: Prefixes, *arguments: Any) -> Any:
        text = plain(self, *arguments)
        begun.add(text.sequence)
        return text

    plain = Prefixes.open
    gc.collect()
    gc.disable()
    try:
        # pytest keeps what is logged, frames included.
        with mock.patch.object(Prefixes, "open", opened), mock.patch.object(module._log, "exception"):
            left, failed, beside = (
                engine.stream(Request(varied_tokens(20, seed=row), Options(tokens, 2, logits_processors=processors)))
                for row, (tokens, processors) in enumerate([(900, None), (900, [faulty]), (60, None)])
            )
            with pytest.raises(ZeroDivisionError) as error:
                list(failed)
            left.close()
            tokens_of(beside)
            end = time.monotonic() + 10
            while begun and time.monotonic() < end:
                time.sleep(0.01)
    finally:
        gc.enable()
    assert not begun and error.value


def test_nobody_waits_for_an_engine_that_has_ended(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it ended: a fault where requests are closed, or one of the engine's own."""
    pair, tokenizer = loaded

    def fault(*_: object) -> None:
        raise RuntimeError("out of memory")

    for place, name in ((Prefixes, "store"), (Engine, "_admit")):
        served = Engine(pair, tokenizer, Prefixes(pair, 10**9, near=1), slots=2)
        streams = [served.stream(Request(varied_tokens(200, i), Options(800, 0))) for i in range(4)]
        for stream in streams[:2]:
            next(event for event in stream if isinstance(event, Piece))
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fault)
            if place is Prefixes:
                served.close(10)
            served._thread.join(10)
        for stream in streams:
            with pytest.raises(BusyError, match="closed"):
                while stream.get(10):
                    pass
        with pytest.raises(BusyError, match="closed"):
            served.stream(Request([5]))
        served.close(10)


def test_a_cache_that_cannot_be_written_does_not_end_the_engine(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, tokenizer = loaded
    monkeypatch.setattr(module, "SETTLED", 0.01)
    flushed = threading.Event()

    def fault(*_: object) -> bool:
        flushed.set()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Prefixes, "flush", fault)
    served = Engine(pair, tokenizer, Prefixes(pair, 10**9, near=1))
    assert len(tokens_of(served.stream(Request(varied_tokens(9), Options(5, 0))))) == 5
    assert flushed.wait(10)
    assert len(tokens_of(served.stream(Request(varied_tokens(9), Options(5, 0))))) == 5
    monkeypatch.undo()
    served.close(10)


def test_newcomers_do_not_starve_who_is_being_served(loaded: Loaded) -> None:
    """Requests whose prompts are known take a single slice, and there is always another one."""
    pair, tokenizer = loaded
    served = Engine(pair, tokenizer, Prefixes(pair, 10**9, near=1), slots=3)
    short, crowd, written = Request(varied_tokens(20), Options(1, 0)), list[Stream](), list[int]()
    tokens_of(served.stream(short))
    long = served.stream(Request(varied_tokens(5), Options(200, 0)))
    next(long)

    def ask() -> None:
        written.append(long._job.events.qsize())
        if len(crowd) < 40 and served.load.waiting < 2:
            crowd.append(served.stream(short))
            crowd[-1].watch(ask)

    ask()
    deadline = time.monotonic() + 20
    while len(crowd) < 40 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert written[-1] > 20
    served.close(10)


def test_whoever_waits_for_a_stream_is_woken_when_somebody_closes_it(engine: Engine) -> None:
    stream = engine.stream(Request(varied_tokens(900), Options(5, 0, prefill_step_size=2)))
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    stream.close()
    reader.join(5)
    assert not reader.is_alive()


def test_who_finds_no_memory_waits_until_others_have_ended(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, tokenizer = loaded
    prefixes, needed = Prefixes(pair, 0), pair.target.kv_bytes(700) + pair.drafter.kv_bytes(700)
    monkeypatch.setattr(memory, "free_bytes", lambda: int(1.2 * needed) - prefixes.claims.held)
    tried, put_back = list[object](), Engine._put_back

    def count(engine: Engine, job: Any) -> None:
        tried.append(job)
        put_back(engine, job)

    monkeypatch.setattr(Engine, "_put_back", count)
    served = Engine(pair, tokenizer, prefixes, slots=3)
    requests = [Request(varied_tokens(600 - i, seed=i), Options(30, 0, prefill_step_size=20)) for i in range(3)]
    streams = [served.stream(request) for request in requests]
    assert [len(tokens_of(stream)) for stream in streams] == [30] * 3
    assert len(tried) == 2, "each is tried again only when somebody has left"
    served.close(10)


@pytest.mark.parametrize(("model", "template"), [("gemma4_keqv", BRACES), ("qwen3_5_tied", TAGS)])
@pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "written"])
def test_a_loop_of_calls_reads_nothing_twice(model: str, template: str, predicted: bool) -> None:
    """Replies that the tokenizer would split otherwise; a prediction is right to the end, and beyond it."""
    pair, words = load(FIXTURES / model, dtype=mx.float32)[0].pair, tokenizer(template, 300)
    dialect = find_dialect(words.get_vocab())
    chat, served = Conversations(words, dialect), Engine(pair, words, Prefixes(pair, 10**9, near=1))
    messages, known = [system("Be brief."), user("weather in Paris?")], list[int]()
    for turn in range(4):
        prompt = chat.prompt(Talk(messages, [WEATHER], thinking=True))
        assert prompt.ids[: len(known)] == known
        reply = [token for c in _characters(words, CALLS[template]) for token in c]
        script = mx.array([0] * len(prompt.ids) + reply + [7] * 64, mx.int32)
        options = Options(300, 3, Says(script), drafts="argmax", stops=frozenset(reply[-1:]), seed=0)
        options = replace(options, prediction=[*reply, *[7] * 40] if predicted else None)
        pieces = [p for p in served.stream(Request(prompt.ids, options, marks=prompt.marks)) if isinstance(p, Piece)]
        assert [token.id for piece in pieces for token in piece.tokens] == reply
        assert pieces[-1].stats.cached_tokens == max(0, len(known) - 1), "all but the token that ended the reply"
        assert not predicted or pieces[-1].stats.copied_accepted > len(reply) // 2
        known = [*prompt.ids, *reply]
        chat.remember(known)
        arguments = json.dumps({"city": "Paris"})
        messages += [answer(None, reasoning_content="I call.", tool_calls=[call(arguments)]), result(f"sunny {turn}")]
    served.close(10)


def _characters(words: TokenizerWrapper, text: str) -> Iterator[list[int]]:
    """Markers as they are, the rest one character at a time."""
    for piece in re.split(f"({'|'.join(map(re.escape, MARKERS))})", text):
        for part in [piece] if piece in MARKERS else piece:
            yield words.encode(part, add_special_tokens=False)


def test_what_fails_in_the_middle_leaves_nothing_behind(loaded: Loaded) -> None:
    """Logits that are not finite, in the prompt's wake or later, and a grammar that leads nowhere."""
    sound, tokenizer = loaded
    asked = Request(varied_tokens(30, seed=3), Options(30))
    expected = ids(alone(loaded, asked))
    poison = next(token for token in range(4, 320) if token not in [*asked.prompt, *expected])
    pair = replace(sound, target=AlteredTarget(sound.target, poison=poison), programs=Programs(), measured={})
    guide = Guide.of(
        tokenizer, pair.target.vocabulary, frozenset(tokenizer.eos_token_ids), find_dialect(tokenizer.get_vocab())
    )
    letters = tokenizer.encode("abc", add_special_tokens=False)
    forbidden = Penalties(bias=tuple((token, float("-inf")) for token in letters))
    prefixes = Prefixes(pair, 10**9, near=1)
    served = Engine(pair, tokenizer, prefixes, slots=2)
    good = served.stream(asked)
    for prompt, options in (
        ([*varied_tokens(20), poison], Options(20)),
        ([*varied_tokens(20), 5], Options(20, "auto", Says(mx.array([poison] * 99)), drafts="argmax")),
        ([7], Options(20, "auto", penalties=forbidden, grammar=Grammar.choice(guide, ["abc"]))),
    ):
        with pytest.raises(MTPError, match=r"not finite|grammar"):
            tokens_of(served.stream(Request(prompt, options)))
    assert tokens_of(good) == expected == tokens_of(served.stream(asked))
    served.close(10)
    assert not prefixes._texts and not any(measured.busy for measured in pair.measured["auto"])
