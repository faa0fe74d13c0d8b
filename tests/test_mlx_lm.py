"""mlx-lm's own programs run with our pair inside, and write what they write without it."""

import importlib
import inspect
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx_lm
import pytest
from conftest import AS_BUILT, FIXTURES, varied_tokens

from mtp_mlx import mlx_lm as programs
from mtp_mlx.errors import RequestError
from mtp_mlx.hub import DEMOS
from mtp_mlx.mlx_lm import Inside, main, replaced
from mtp_mlx.model import Model
from mtp_mlx.sampling import Greedy, Sample

DEMO = str(DEMOS["demo"])
QUESTION = "def add(a, b):"


def module(name: str) -> ModuleType:
    return importlib.import_module(f"mlx_lm.{name}")


def call(*arguments: str) -> int:
    """The command line, within this process; its exit code."""
    with mock.patch.object(sys, "argv", ["mlx_lm", *arguments]), pytest.raises(SystemExit) as left:
        main()
        sys.exit(0)
    return int(left.value.code or 0)


def stock(name: str, *arguments: str) -> None:
    """mlx-lm's program as it is."""
    with mock.patch.object(sys, "argv", [name, *arguments]):
        module(name).main()


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """As much of lm_eval as mlx-lm's program names; the tasks are a score of two answers, of a text, and a text."""
    package, api = ModuleType("lm_eval"), ModuleType("lm_eval.api")
    model, registry = ModuleType("lm_eval.api.model"), ModuleType("lm_eval.api.registry")
    vars(model)["LM"] = object
    vars(registry)["register_model"] = lambda name: lambda kind: kind
    vars(package)["simple_evaluate"] = _evaluate
    for part in (package, api, model, registry):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    monkeypatch.setattr(module("evaluate"), "version", lambda name: "0")
    yield package
    del sys.modules["mlx_lm.evaluate"]


def _request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def _evaluate(model: Any, **options: Any) -> dict[str, Any]:
    pairs = [(QUESTION, "\n    return a + b"), (QUESTION, " pass"), ("import", " numpy as np")]
    found = {
        "scores": model.loglikelihood([_request(*pair) for pair in pairs]),
        "rolling": model.loglikelihood_rolling([_request("import os\nimport sys\n"), _request("x")]),
        "texts": model.generate_until(
            [_request(text, {"until": ["\n\n"], "max_gen_toks": 5}) for text in (QUESTION, "import numpy as")]
        ),
        "kind": type(model._model).__name__,
        "writer": vars(module("evaluate"))["batch_generate"].__module__,
    }
    return {"results": {"found": found}}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("generate", {"load", "stream_generate", "make_sampler"}),
        ("chat", {"load", "sharded_load", "stream_generate", "make_sampler"}),
        ("server", {"load", "sharded_load", "stream_generate", "make_sampler", "ModelProvider"}),
        ("perplexity", {"load"}),
    ],
)
def test_the_names_that_are_replaced_are_there(name: str, names: set[str]) -> None:
    """Should mlx-lm rename one of them, its program would run without the pair."""
    put_in = programs.PROGRAMS[name].names(Inside(), module(name))
    assert put_in.keys() == names
    source = Path(str(module(name).__file__)).read_text()
    for replacement in names:
        assert replacement in vars(module(name))
        assert f"{replacement}(" in source.replace(f"def {replacement}(", "").replace(f"class {replacement}(", "")
    assert "main" in vars(module(name))


def test_a_name_that_mlx_lm_no_longer_has_is_an_error() -> None:
    fake = ModuleType("mlx_lm.fake")
    with pytest.raises(RequestError, match=r"has no load in mlx_lm\.fake"), replaced(fake, {"load": print}):
        pass


def test_names_are_put_back() -> None:
    held = dict(vars(module("perplexity")))
    assert call("perplexity", "--help") == 0
    assert vars(module("perplexity")) == held


@pytest.mark.parametrize("options", [(), ("--depth", "3"), ("--drafter", "none"), ("--drafter-bits", "8")], ids=str)
def test_generate_writes_mlx_lms_text(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", DEMO, "--prompt", QUESTION, "--max-tokens", "10", "--verbose", "False"]
    stock("generate", *arguments)
    wanted = capsys.readouterr().out
    assert call(*options, "generate", *arguments) == 0
    assert capsys.readouterr().out == wanted


def test_a_seed_gives_the_same_text_again(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", DEMO, "--prompt", "import ", "--max-tokens", "8", "--verbose", "False"]
    texts = []
    for seed, depth in (("3", "2"), ("3", "auto"), ("4", "2")):
        assert call(*arguments, "--temp", "0.9", "--top-p", "0.95", "--seed", seed, "--depth", depth) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_samplers_are_made_of_mlx_lms_arguments() -> None:
    """Once mlx-lm's function takes others, these have to follow."""
    theirs, mine = (inspect.signature(make) for make in (module("sample_utils").make_sampler, programs.make_sampler))
    assert [(p.name, p.default) for p in theirs.parameters.values()] == [
        (p.name, p.default) for p in mine.parameters.values()
    ]
    assert programs.make_sampler(0.0, 0.9, 0.1) == Greedy()
    given = (0.7, 0.9, 0.1, 2, 40, 0.5, 0.2, [3])
    values: dict[str, Any] = {"top_p": 0.9, "min_p": 0.1, "min_tokens_to_keep": 2, "top_k": 40}
    xtc: dict[str, Any] = {"xtc_probability": 0.5, "xtc_threshold": 0.2, "xtc_special_tokens": (3,)}
    assert programs.make_sampler(*given) == Sample(0.7, **values, **xtc)


def test_generate_drafts_and_says_what_came_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--prompt", QUESTION, "--max-tokens", "16", "--model", "demo"]
    assert call(*arguments, "--depth", "3") == 0
    out, err = capsys.readouterr()
    assert "Generation: 16 tokens" in out  # mlx-lm's own line
    assert err.startswith("\nmtp-mlx: "), "the text has not ended its line"
    kept, drafted, rounds = (int(word) for word in err.split() if word.isdigit())
    assert 0 < kept <= drafted and rounds < 16
    assert call("--drafter", "none", *arguments, "--depth", "0") == 0
    assert "0 of 0 drafts kept" in capsys.readouterr().err


def test_generate_takes_a_prompt_cache_of_mlx_lms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.safetensors"
    stock("cache_prompt", "--model", DEMO, "--prompt", "import numpy as np\n", "--prompt-cache-file", str(file))
    capsys.readouterr()
    arguments = ["--prompt-cache-file", str(file), "--prompt", QUESTION, "--max-tokens", "8", "--verbose", "False"]
    stock("generate", *arguments)
    wanted = capsys.readouterr().out
    assert call("generate", *arguments, "--depth", "2") == 0
    assert capsys.readouterr().out == wanted


def test_generate_takes_an_adapter_of_mlx_lms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["mlp.down_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": sizes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = mlx_lm.load(DEMO)[0]
    last = len(model.layers) - 1
    shape = model.layers[last].mlp.down_proj.weight.shape
    mx.random.seed(1)
    name = next(name for name, _ in model.named_modules() if name.endswith(f"layers.{last}.mlp.down_proj"))
    tensors = {f"{name}.lora_a": mx.random.normal((shape[1], 2)), f"{name}.lora_b": mx.random.normal((2, shape[0]))}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    plain = ["--model", DEMO, "--prompt", QUESTION, "--max-tokens", "8", "--verbose", "False"]
    texts = []
    for arguments in (plain, [*plain, "--adapter-path", str(tmp_path)]):
        stock("generate", *arguments)
        wanted = capsys.readouterr().out
        assert call("generate", *arguments) == 0
        texts.append(capsys.readouterr().out)
        assert texts[-1] == wanted
    assert texts[0] != texts[1]


class Scripted:
    """In place of mlx-lm's chat on a terminal: two questions, a reset, a question."""

    said: list[str]
    turns: list[str]

    def __init__(self, *arguments: Any, **options: Any):
        self.rest = iter([QUESTION, "import os", "r", QUESTION, "q"])
        type(self).said = [""]

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *error: object) -> None: ...

    def prompt(self) -> str:
        return next(self.rest)

    def stream_token(self, text: str) -> None:
        self.said[-1] += text

    def end_turn(self, response: Any) -> None:
        self.said.append("")

    def say_reset(self) -> None: ...

    def say_bye(self) -> None: ...


@pytest.mark.parametrize("demo", DEMOS)
def test_chat_goes_on_over_turns_as_mlx_lms(demo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = str(shutil.copytree(DEMOS[demo], tmp_path / demo))
    (tmp_path / demo / "chat_template.jinja").write_text("{{ messages[0].content }}\n")
    monkeypatch.setattr(module("chat"), "ChatUI", Scripted)
    stock("chat", "--model", folder, "--max-tokens", "6")
    wanted = Scripted.said
    assert call("chat", "--model", folder, "--max-tokens", "6", "--depth", "2") == 0
    assert Scripted.said == wanted
    assert wanted[0] == wanted[2] and wanted[0] != wanted[1]


def test_perplexity_is_mlx_lms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = mx.array(varied_tokens(96)).reshape(3, 32)
    monkeypatch.setattr(module("perplexity"), "load_data", lambda *arguments, **options: data)
    lines = []
    for start in (lambda: stock("perplexity", "--model", DEMO), lambda: call("perplexity", "--model", DEMO)):
        start()
        out, err = capsys.readouterr()
        lines.append([line for line in out.splitlines() if "Perplexity:" in line or "parameters" in line])
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert err == "mtp-mlx: nothing is drafted: a perplexity needs no text to be written\n"


@pytest.mark.parametrize(
    ("drafter", "words"), [("auto", "without drafts, and written with them"), ("none", "nothing is drafted")]
)
def test_evaluate_scores_as_mlx_lms(
    drafter: str, words: str, lm_eval: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", DEMO, "--tasks", "found", "--output-dir", str(tmp_path), "--no-apply-chat-template"]
    found = []
    for start in (lambda: stock("evaluate", *arguments), lambda: call("evaluate", "--drafter", drafter, *arguments)):
        start()
        _, err = capsys.readouterr()
        (file,) = tmp_path.iterdir()
        found.append(json.loads(file.read_text())["found"])
    assert (found[0].pop("kind"), found[1].pop("kind")) == ("Model", "Model")
    writers = ["mlx_lm.generate", "mtp_mlx.mlx_lm" if drafter == "auto" else "mlx_lm.generate"]
    assert [one.pop("writer") for one in found] == writers
    for name in ("scores", "rolling"):
        for mine, wanted in zip(found[1].pop(name), found[0].pop(name), strict=True):
            assert mine == pytest.approx(wanted, abs=1e-3)
    assert found[0] == found[1] and all(found[0]["texts"])
    assert [words in line for line in err.splitlines() if line.startswith("mtp-mlx: ")] == [True]


def test_evaluate_without_lm_eval_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    assert call("evaluate", "--model", DEMO, "--tasks", "x") == 1
    assert "pip install lm-eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "usage: python -m mtp_mlx.mlx_lm"),
        (["lora", "--train"], 2, "no program 'lora' here; choose one of generate, chat"),
        (["generate", "--model", str(FIXTURES)], 1, "has no config.json"),
        (["generate", "--model", f"{DEMO}/assistant"], 1, "is a drafter; give its target"),
        (["generate", "--model", DEMO, "--drafter", str(FIXTURES / "gemma4_ple" / "assistant")], 1, "another target"),
        (["generate", "--model", DEMO, "--draft-model", DEMO], 1, "by --drafter"),
        (["generate", "--model", DEMO, "--depth", "-3"], 1, "depth"),
        (["generate", "--depth", "deep"], 2, "--depth"),
        (["generate", "--model", DEMO, "--max-kv-size", "64"], 1, "max_kv_size"),
        (["server", "--model", f"{DEMO}/assistant"], 1, "is a drafter; give its target"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == code
    err = capsys.readouterr().err
    assert words in err
    if code == 1:
        assert [line for line in err.splitlines() if line.startswith("mtp-mlx: ")][-1] == err.splitlines()[-1]


@pytest.mark.parametrize("name", ["generate", "chat", "server", "perplexity"])
def test_help_is_the_programs_with_our_options_before_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    out = capsys.readouterr().out
    assert out.index("--drafter NAME") < out.index(f"usage: mtp_mlx.mlx_lm {name}") < out.index("--trust-remote-code")
    assert call("--help") == 0
    assert "--drafter-bits" in capsys.readouterr().out


def test_several_machines_are_refused() -> None:
    with pytest.raises(RequestError, match="one machine"):
        programs.refuse_several_machines("model", None, None)


@pytest.mark.parametrize(("drafter", "batches"), [("auto", False), ("none", True)])
def test_the_server_batches_only_where_nothing_is_drafted(drafter: str, batches: bool) -> None:
    server = module("server")
    names = programs.PROGRAMS["server"].names(Inside(drafter), server)
    options = {"model": DEMO, "adapter_path": None, "draft_model": None, "trust_remote_code": False}
    given = SimpleNamespace(**options, chat_template="", use_default_chat_template=False, pipeline=False)
    with replaced(server, names):
        provider = server.ModelProvider(given)
    assert isinstance(provider.model, Model)
    assert provider.is_batchable is batches


@pytest.fixture
def address() -> Iterator[str]:
    """A server in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["server", "--model", "demo", "--port", str(port), "--depth", "2", "--prompt-cache-size", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mtp_mlx.mlx_lm", *arguments], env=AS_BUILT, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        _, errors = process.communicate()
    assert "one after the other, with drafts" in errors and "Traceback" not in errors


def ask(address: str, **fields: Any) -> dict[str, Any]:
    body = json.dumps({"model": "default_model", "max_tokens": 8, **fields}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def test_the_server_answers_with_mlx_lms_text_and_goes_on_from_its_prompt_cache(address: str) -> None:
    model, tokenizer = mlx_lm.load(DEMO)  # type: ignore[misc]
    first = ask(address, prompt=QUESTION)
    text = first["choices"][0]["text"]
    assert text == mlx_lm.generate(model, tokenizer, QUESTION, max_tokens=8)
    longer = QUESTION + text + "\n"
    second = ask(address, prompt=longer)
    assert second["choices"][0]["text"] == mlx_lm.generate(model, tokenizer, longer, max_tokens=8)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    third = ask(address, prompt=QUESTION, repetition_penalty=1.3, temperature=0.7, seed=3)
    assert third["usage"]["completion_tokens"] > 0
    with pytest.raises(urllib.error.HTTPError) as error:  # of the request only; the server goes on
        ask(address, prompt=QUESTION, model=f"{DEMO}/assistant")
    assert "is a drafter" in error.value.read().decode()
    assert ask(address, prompt=QUESTION)["choices"][0]["text"] == text


GUIDE = (Path(__file__).parent.parent / "docs" / "mlx-lm.md").read_text()


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL))
def test_an_example_of_the_guide_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/mlx-lm.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.strip()
    if "attach" in example:
        mine, wanted = out[: len(out) // 2], out[len(out) // 2 :]
        assert mine == wanted


@pytest.mark.parametrize("line", re.findall(r"^python -m mtp_mlx.*$", GUIDE, flags=re.MULTILINE))
def test_a_command_of_the_guide_is_one_that_the_program_takes(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)[3:]
    seen: list[str] = []
    monkeypatch.setattr(programs, "run", lambda name, inside, arguments: seen.extend([name, *arguments]))
    call(*words)
    options = [word for word in seen if word.startswith("--")]
    source = (Path(mlx_lm.__file__).parent / f"{seen[0]}.py").read_text()
    assert seen[0] in programs.PROGRAMS and options
    assert all(f'"{option}"' in source for option in options)
