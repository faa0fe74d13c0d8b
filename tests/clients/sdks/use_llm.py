"""The llm program against a server: python use_llm.py GIVEN, as use_openai.py."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

given = json.loads(sys.argv[1])
home = Path(given["home"])
(home / "extra-openai-models.yaml").write_text(
    json.dumps(
        [
            {
                "model_id": "local",
                "model_name": given["model"],
                "api_base": given["url"] + "/v1",
                "api_key": "x",
                "supports_tools": True,
                "supports_schema": True,
            }
        ]
    )
)
environment = os.environ | {"LLM_USER_PATH": str(home)}
program = [sys.executable, "-m", "llm", "-m", "local"]


def llm(*arguments: str) -> str:
    done = subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


assert llm("Hello?").strip() == given["text"].strip()
assert llm("--no-stream", "Hello?").strip() == given["text"].strip()
assert json.loads(llm("--schema", "name, age int", "Who?")) == given["person"]
function = 'def weather(city: str, days: int) -> str:\n    "The weather in a city."\n    return f"{city}: sunny"\n'
called = llm("--functions", function, "--td", "Hello?")
assert given["after"] in called, called

endless = subprocess.Popen([*program, "for ever"], env=environment, stdout=subprocess.PIPE)
assert endless.stdout is not None and endless.stdout.read(40)
endless.send_signal(signal.SIGINT)
until = time.monotonic() + 15
while json.load(urllib.request.urlopen(given["url"] + "/health"))["live"]:
    assert time.monotonic() < until, "the server goes on writing"
    time.sleep(0.05)
endless.kill()

report = {"version": version("llm"), "streams": "yes", "stops": "yes", "calls": "yes", "continues": "yes"}
print(json.dumps(report | {"remarks": "--schema, --functions"}))
