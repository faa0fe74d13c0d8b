"""Answers of `/infill`, as llama.cpp's clients read them."""

from served import Served, chunks, serving
from served import _shared as _shared
from served import served as served

INFILL = "/infill"
GAP = {"input_prefix": "def f(", "input_suffix": "):", "depth": 0}


def test_a_gap_is_filled(served: Served) -> None:
    body = served.says("x, y").post(INFILL, **GAP)
    assert (body["content"], body["stop"], body["stop_type"]) == ("x, y", True, "eos")
    assert body["tokens_predicted"] == len(body["tokens"]) and body["tokens_evaluated"] == len(
        served.engine.seen[-1].prompt
    )
    text = served.client.post(INFILL, json=GAP | {"stream": True}).text
    told = chunks(text, done=False)
    assert "".join(chunk["content"] for chunk in told) == "x, y"
    assert [chunk["stop"] for chunk in told] == [False] * (len(told) - 1) + [True]
    assert "timings" in told[-1]


def test_why_it_ended_is_told(served: Served) -> None:
    served.says("one two three")
    body = served.post(INFILL, **GAP, stop=["two"])
    assert (body["content"], body["stop_type"], body["stopping_word"]) == ("one ", "word", "two")
    assert served.post(INFILL, **GAP, n_predict=2)["stop_type"] == "limit"
    assert served.engine.seen[-1].options.max_tokens == 2
    assert served.post(INFILL, **GAP, n_predict=-1)["stop_type"] == "eos"


def test_a_warm_up_reads_the_prompt_and_says_nothing(served: Served) -> None:
    gap = GAP | {"input_prefix": "class Stack:\n    def push(self"}
    body = served.says("x").post(INFILL, **gap, n_predict=0)
    assert (body["content"], body["tokens_predicted"], body["tokens"]) == ("", 0, [])
    assert served.client.post(INFILL, json=gap | {"n_predict": 0, "stream": True}).text.count("data:") == 1
    again = served.post(INFILL, **gap)
    assert again["content"] == "x" and again["tokens_cached"] == again["tokens_evaluated"] - 1


def test_time_to_write_may_be_bounded(served: Served) -> None:
    body = served.says("word " * 100).post(INFILL, **GAP, t_max_predict_ms=1)
    assert body["stop_type"] == "limit" and 0 < body["tokens_predicted"] < 100


def test_other_clients_fields_are_taken_and_others_are_not(served: Served) -> None:
    served.says("x").post(
        INFILL, **GAP, id_slot=0, cache_prompt=True, samplers=["top_k"], n_indent=4, t_max_prompt_ms=500, prompt="a",
        temperature=0.0, top_k=40, top_p=0.9,
    )  # fmt: skip
    assert served.engine.seen[-1].prompt[-1] == served.engine.words.encode("a", add_special_tokens=False)[0]
    assert served.refused(INFILL, **GAP, grammar="root ::= x")["param"] == "grammar"
    assert "other files" in served.refused(INFILL, **GAP, input_extra=[{"text": "x", "filename": "a"}])["message"]
    with serving(infill=False) as (client, _):
        assert client.post(INFILL, json=GAP).json()["error"]["code"] == "no_infill"
