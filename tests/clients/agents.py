"""Programs that edit files, as their users run them: how each is pointed at a server, and what it calls its tools."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clients.serving import NAME

CONTEXT, OUTPUT = 131072, 8192
OLD, NEW = "def greet(name):", "def welcome(name):"
BLOCK = f"I rename it.\n\ngreet.py\n```python\n<<<<<<< SEARCH\n{OLD}\n=======\n{NEW}\n>>>>>>> REPLACE\n```\n"


@dataclass(frozen=True)
class Agent:
    """A program on the PATH.

    `files` are written below its home, and `steps` are the tools it is to be told to call, with the path of the file in
    place of FILE. One without steps writes edits as text.
    """

    name: str
    program: str
    install: str
    command: tuple[str, ...]
    environment: Callable[[str], Mapping[str, str]] = lambda url: {}
    files: Callable[[str], Mapping[str, str]] = lambda url: {}
    prepare: Callable[[str], tuple[str, ...]] = lambda url: ()
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    text: str = ""
    remark: str = ""


def _opencode(url: str) -> dict[str, str]:
    model = {NAME: {"limit": {"context": CONTEXT, "output": OUTPUT}}}
    options = {"baseURL": f"{url}/v1", "apiKey": "x"}
    config = {
        "autoupdate": False,
        "share": "disabled",
        "model": f"local/{NAME}",
        "small_model": f"local/{NAME}",
        "provider": {"local": {"npm": "@ai-sdk/openai-compatible", "options": options, "models": model}},
    }
    return {".config/opencode/opencode.json": json.dumps(config)}


def _continue(url: str) -> dict[str, str]:
    return {
        "config.yaml": f"""\
name: local
version: 0.0.1
schema: v1
models:
  - name: local
    provider: openai
    model: {NAME}
    apiBase: {url}/v1
    apiKey: x
    roles: [chat, edit, apply]
    capabilities: [tool_use]
"""
    }


def _pi(url: str) -> dict[str, str]:
    model = {
        "id": NAME,
        "name": NAME,
        "reasoning": False,
        "input": ["text"],
        "contextWindow": CONTEXT,
        "maxTokens": OUTPUT,
    }
    model["cost"] = {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}
    provider = {"baseUrl": f"{url}/v1", "api": "openai-completions", "apiKey": "x", "models": [model]}
    return {".pi/agent/models.json": json.dumps({"providers": {"local": provider}})}


AGENTS = (
    Agent(
        "aider",
        "aider",
        "pip install aider-chat",
        (
            *("aider", "--model", f"openai/{NAME}", "--no-show-model-warnings", "--analytics-disable"),
            *("--no-check-update", "--no-auto-commits", "--yes-always", "--no-gitignore", "--map-tokens", "0"),
            *("--edit-format", "diff", "--message", "PROMPT", "greet.py"),
        ),
        environment=lambda url: {
            "OPENAI_API_BASE": f"{url}/v1",
            "OPENAI_API_KEY": "x",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
        text=BLOCK,
        remark="edits as text, calls no tools",
    ),
    Agent(
        "opencode",
        "opencode",
        "npm install -g opencode-ai",
        ("opencode", "run", "PROMPT"),
        files=_opencode,
        steps=(
            ("read", {"filePath": "FILE"}),
            ("edit", {"filePath": "FILE", "oldString": OLD, "newString": NEW}),
        ),
    ),
    Agent(
        "continue",
        "cn",
        "npm install -g @continuedev/cli",
        ("cn", "-p", "--auto", "--config", "HOME/config.yaml", "PROMPT"),
        environment=lambda url: {"CONTINUE_GLOBAL_DIR": "HOME/.continue", "CONTINUE_TELEMETRY_ENABLED": "0"},
        files=_continue,
        steps=(
            ("Read", {"filepath": "FILE"}),
            ("Edit", {"file_path": "FILE", "old_string": OLD, "new_string": NEW}),
        ),
    ),
    Agent(
        "cline",
        "cline",
        "npm install -g cline",
        ("cline", "-P", "openai-compatible", "-m", NAME, "PROMPT"),
        prepare=lambda url: (
            *("cline", "auth", "openai", "--baseurl", f"{url}/v1", "--apikey", "x", "--modelid", NAME),
        ),
        steps=(
            ("read_files", {"files": [{"path": "FILE"}]}),
            ("editor", {"path": "FILE", "old_text": OLD, "new_text": NEW}),
        ),
    ),
    Agent(
        "qwen-code",
        "qwen",
        "npm install -g @qwen-code/qwen-code",
        ("qwen", "--auth-type", "openai", "--approval-mode", "yolo", "-p", "PROMPT"),
        environment=lambda url: {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_MODEL": NAME},
        files=lambda url: {".qwen/settings.json": json.dumps({"privacy": {"usageStatisticsEnabled": False}})},
        steps=(
            ("read_file", {"file_path": "FILE"}),
            ("edit", {"file_path": "FILE", "old_string": OLD, "new_string": NEW}),
        ),
    ),
    Agent(
        "pi",
        "pi",
        "npm install -g @earendil-works/pi-coding-agent",
        ("pi", "--provider", "local", "--model", NAME, "-p", "PROMPT"),
        files=_pi,
        steps=(
            ("read", {"path": "FILE"}),
            ("edit", {"path": "FILE", "edits": [{"oldText": OLD, "newText": NEW}]}),
        ),
    ),
)
