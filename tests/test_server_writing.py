from typing import Any

import pytest
from served import TOOL, Served
from served import _shared as _shared  # fixtures
from served import served as served

CHAT, RAW = "/v1/chat/completions", "/v1/completions"
GAP = "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n\nprint(add(1, 2))<|fim_middle|>"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
CALLED = [
    {"role": "system", "content": "x"},
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "hm",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "ok"},
]
# As documented, or read in the sources, of editors that no test here can run.
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "zed, edit prediction": (RAW, {"prompt": GAP, "max_tokens": 8, "temperature": None, "stop": ["<|endoftext|>"]}),
    "zed, chat": (CHAT, STREAMED | {"messages": PARTS, "stop": [], "tools": [], "max_completion_tokens": 9}),
    "minuet": (RAW, {"prompt": "def a(", "suffix": "):", "stream": True, "max_tokens": 8, "top_p": 0.9}),
    "continue, completion": (
        RAW,
        {"prompt": GAP, "max_tokens": 8, "temperature": 0.01, "stream": True, "stop": ["\n\n"]},
    ),
    "gptel": (CHAT, STREAMED | {"messages": CALLED, "temperature": 1.0}),
    "copilot": (CHAT, STREAMED | {"messages": PARTS, "n": 1, "top_p": 1, "tools": [TOOL], "tool_choice": "auto"}),
    "llama.vscode": (
        "/infill",
        {
            "input_prefix": "def a(",
            "input_suffix": "):",
            "input_extra": [],
            "prompt": "",
            "n_predict": 8,
            "n_indent": 0,
            "n_cmpl": 1,
            "id_slot": 0,
            "cache_prompt": True,
            "samplers": ["top_k", "top_p", "infill"],
            "top_k": 40,
            "top_p": 0.99,
            "stream": False,
            "t_max_prompt_ms": 500,
            "t_max_predict_ms": 500_000,
        },
    ),
}


@pytest.mark.parametrize("editor", BODIES)
def test_bodies_are_taken_as_editors_send_them(served: Served, editor: str) -> None:
    path, body = BODIES[editor]
    answer = served.says("a + b").client.post(path, json=body | {"model": "tiny"})
    assert answer.status_code == 200, answer.text
    assert '"error"' not in answer.text and "a" in answer.text
    assert answer.headers["content-type"].startswith("text/event-stream" if body.get("stream") else "application/json")
