"""Libraries and one-shot programs: scripts of their own users, each run by the interpreter that has it."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clients.report import Report
from clients.serving import NAME, Body, Family, Turn, scripted

SCRIPTS = Path(__file__).parent / "sdks"
SECONDS = 120
CITY, DAYS = 'Zürich "am See"', 3
SAID = {
    "thought": "The user greets me; I greet back.",
    "text": "Hëllo wörld 🦊!\n\n```python\nprint('</think> is text here')\n```\nEnd.",
    "call_text": "I look it up.",
    "arguments": {"city": CITY, "days": DAYS},
    "after": "In Zürich it will be sunny: 21 °C.",
    "person": {"name": "Ada", "age": 36},
    "completion": "def add(a, b):\n    return a + b\n",
    "endless": "and so on ",
}


@dataclass(frozen=True)
class Library:
    """`probe` is what the interpreter runs to tell whether it is there."""

    name: str
    script: str
    install: str
    probe: str

    @property
    def runs_on_node(self) -> bool:
        return self.script.endswith(".mjs")


LIBRARIES = (
    Library("openai-python", "use_openai.py", "pip install openai", "import openai"),
    Library("openai-node", "use_openai.mjs", "npm install -g openai", "require.resolve('openai')"),
    Library("litellm", "use_litellm.py", "pip install litellm", "import litellm"),
    Library("langchain-openai", "use_langchain.py", "pip install langchain-openai", "import langchain_openai"),
    Library("llm", "use_llm.py", "pip install llm", "import llm"),
    Library(
        "pydantic-ai",
        "use_pydantic_ai.py",
        "pip install 'pydantic-ai-slim[openai]'",
        "import pydantic_ai.models.openai",
    ),
)


def find(library: Library, python: str) -> str | None:
    """The interpreter that has it."""
    node = shutil.which("node")
    if library.runs_on_node and node is None:
        return None
    command = (str(node), "-e") if library.runs_on_node else (python, "-c")
    done = subprocess.run(
        [*command, library.probe], env=_environment(Path("/")), capture_output=True, timeout=SECONDS, check=False
    )
    return command[0] if done.returncode == 0 else None


def checking(library: Library, interpreter: str) -> Callable[[Family], Report]:
    def check(family: Family) -> Report:
        with tempfile.TemporaryDirectory() as home, scripted(family, script) as place:
            given = json.dumps(SAID | {"url": place.url, "model": NAME, "home": home})
            done = subprocess.run(
                [interpreter, str(SCRIPTS / library.script), given],
                env=_environment(Path(home)),
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            refused = [(each.path, each.answer.decode()[:300]) for each in place.exchanges if each.status >= 400]
            assert done.returncode == 0, f"{refused}\n{done.stderr[-1500:]}"
        told = json.loads(done.stdout.strip().splitlines()[-1])
        return Report(**told)

    return check


def script(body: Body) -> Turn | str:
    """What the model says to these scripts, told by what they ask."""
    if "prompt" in body:
        return str(SAID["completion"])
    messages = body["messages"]
    last = messages[-1]
    if last["role"] == "tool":
        return Turn(str(SAID["after"]))
    if (body.get("response_format") or {}).get("type") == "json_schema":
        return Turn(json.dumps(SAID["person"]), shaped=True)
    if "for ever" in json.dumps(last["content"]):
        return Turn(str(SAID["endless"]) * 20000)
    if body.get("tools"):
        return Turn(str(SAID["call_text"]), str(SAID["thought"]), (("weather", {"city": CITY, "days": DAYS}),))
    return Turn(str(SAID["text"]), str(SAID["thought"]))


def _environment(home: Path) -> dict[str, str]:
    modules = [str(Path(folder).parent / "lib" / "node_modules") for folder in os.environ["PATH"].split(os.pathsep)]
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "NODE_PATH": os.pathsep.join(modules),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
