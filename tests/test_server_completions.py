"""Answers of raw texts: prompts of every form, gaps, echoes."""

from typing import Any

import pytest
from served import Served, serving
from served import _shared as _shared
from served import served as served

COMPLETIONS = "/v1/completions"


def _texts(body: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


def test_a_text_goes_on_raw_with_its_markers_read(served: Served) -> None:
    body = served.says("there.").post(COMPLETIONS, prompt="<|im_start|>Hello ", depth=0)
    assert body["object"] == "text_completion" and _texts(body) == ["there."]
    words = served.engine.words
    assert served.engine.seen[-1].prompt == words.encode("<|im_start|>Hello ", add_special_tokens=False)
    chunks = served.stream(COMPLETIONS, prompt="<|im_start|>Hello ", depth=0, stream_options={"include_usage": True})
    assert "".join(text for chunk in chunks for text in _texts(chunk)) == "there."
    assert chunks[-1]["usage"] == body["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "stop"


def test_prompts_of_every_form_are_answered_in_order(served: Served) -> None:
    ids = served.engine.words.encode("One", add_special_tokens=False)
    other = served.engine.words.encode("Two more", add_special_tokens=False)
    served.says("!")
    for prompt, prompts in (
        ("One", [ids]),
        (ids, [ids]),
        (["One", "Two more"], [ids, other]),
        ([ids, other], [ids, other]),
    ):
        served.engine.seen.clear()
        body = served.post(COMPLETIONS, prompt=prompt, n=2, max_tokens=4, depth=0)
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(prompts)))
        assert [request.prompt for request in served.engine.seen] == [ids for ids in prompts for _ in range(2)]
        assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_an_echo_begins_with_the_prompt(served: Served) -> None:
    ids = served.engine.words.encode("One two", add_special_tokens=False)
    served.says(" three")
    for prompt, texts in ("One two", 1), (ids, 1), (["One two", "One two"], 2):
        body = served.post(COMPLETIONS, prompt=prompt, echo=True, depth=0)
        assert _texts(body) == ["One two three"] * texts
    chunks = served.stream(COMPLETIONS, prompt="One two", echo=True, depth=0)
    assert "".join(text for chunk in chunks for text in _texts(chunk)) == "One two three"


def test_logprobs_have_the_older_shape(served: Served) -> None:
    body = served.says("One two").post(COMPLETIONS, prompt="Say:", logprobs=2, depth=0)
    told = body["choices"][0]["logprobs"]
    assert "".join(told["tokens"][:-1]) == "One two"
    assert told["text_offset"][:2] == [0, len(told["tokens"][0])]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"])
    assert all(logprob <= 0 for logprob in told["token_logprobs"])
    chunks = served.stream(COMPLETIONS, prompt="Say:", logprobs=2, depth=0)
    streamed = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [offset for each in streamed for offset in each["text_offset"]] == told["text_offset"]
    assert [token for each in streamed for token in each["tokens"]] == told["tokens"]


def test_a_space_at_the_beginning_is_counted(served: Served) -> None:
    choice = served.says(" there").post(COMPLETIONS, prompt="Hi", logprobs=0, depth=0)["choices"][0]
    told, ends = choice["logprobs"], [*choice["logprobs"]["text_offset"][1:], len(choice["text"])]
    parts = [choice["text"][start:end] for start, end in zip(told["text_offset"], ends, strict=True)]
    assert choice["text"] == " there" and parts == [*told["tokens"][:-1], ""]
    shown = served.post(COMPLETIONS, prompt="Hi", show_drafts=True, depth=0)
    assert "".join(text for text, _ in shown["drafts"][0]) == " there"


def test_parts_of_characters_are_told_by_their_bytes(served: Served) -> None:
    told = served.says("ö").post(COMPLETIONS, prompt="Hi", logprobs=20, depth=0)["choices"][0]["logprobs"]
    assert told["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xb6"]
    # They are not taken for each other. (This tokenizer has no text at all for a few ids.)
    assert min(len(best) for best in told["top_logprobs"]) > 15
    assert any(token.startswith("bytes:") for best in told["top_logprobs"] for token in best)
    assert all([*best.values()] == sorted(best.values(), reverse=True) for best in told["top_logprobs"])


def test_a_gap_is_filled_between_prompt_and_suffix(served: Served) -> None:
    body = served.says("b").post(COMPLETIONS, prompt="a <think>", suffix=" c", depth=0)
    assert _texts(body) == ["b"]
    words = served.engine.words
    markers = [words.convert_tokens_to_ids(f"<|fim_{part}|>") for part in ("prefix", "suffix", "middle")]
    prompt = served.engine.seen[-1].prompt
    assert [token for token in prompt if token in markers] == markers and prompt[-1] == markers[-1]
    assert words.convert_tokens_to_ids("<think>") not in prompt, "a file's text holds no markers"
    with serving(infill=False) as (client, _):
        answer = client.post(COMPLETIONS, json={"prompt": "a", "suffix": "c"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "suffix"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt is missing"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a", "best_of": 3}, "best_of 3"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echoed"),
        ({"prompt": ["a"], "suffix": "c"}, "suffix"),
        ({"prompt": "a", "n": 9}, "n:"),
        ({"prompt": ["a"] * 5, "n": 2}, "more texts than 8"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [4000]}, "vocabulary"),
        ({"prompt": ""}, "empty"),
    ],
)
def test_what_cannot_be_completed_is_refused_by_name(served: Served, body: dict[str, Any], words: str) -> None:
    assert words in served.refused(COMPLETIONS, **body)["message"]
