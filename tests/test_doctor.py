"""What the doctor says of machines that are not here, from what they answer; and that nothing makes it fail."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from loopback import Loopback
from typer.testing import CliRunner

import mtp_mlx.cli.doctor as command
import mtp_mlx.doctor as module
from mtp_mlx.cli.main import app
from mtp_mlx.doctor import Check, Hub, Readers, can_run, examine, figures, low_power, numbers, read, this_machine

PMSET = """\
System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by sharingd)
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
 lowpowermode         {mode}
 womp                 0
"""
DISPLAYS = """\
Graphics/Displays:

    {chip}:

      Chipset Model: {chip}
      Type: GPU
      Bus: Built-In
      Total Number of Cores: {cores}
      Vendor: Apple (0x106b)
      Metal Support: {metal}
"""


SOMEBODY = Hub("https://hub", False, None, "somebody")


@dataclass(frozen=True)
class Mac:
    """What a Mac answers; None for what it does not know."""

    chip: str
    architecture: str
    performance: int
    efficiency: int
    gpu: int
    memory: int
    working_set: int
    macos: str
    wired: int | None = 0
    power: str = PMSET.format(mode=0)
    translated: int | None = 0
    processor: str = "arm64"
    versions: Mapping[str, str] = field(default_factory=lambda: {"mlx": "0.32.4", "mlx-lm": "0.32.2"})
    metal: bool = True
    hub: Hub = SOMEBODY
    free: int = 400 * 10**9
    compiles: bool = True

    def run(self, arguments: Sequence[str]) -> str:
        answers: dict[tuple[str, ...], object] = {
            ("sw_vers", "-productVersion"): self.macos,
            ("pmset", "-g"): self.power,
            ("system_profiler", "SPDisplaysDataType"): DISPLAYS.format(chip=self.chip, cores=self.gpu, metal="Metal 4"),
            ("sysctl", "-n", "machdep.cpu.brand_string"): self.chip,
            ("sysctl", "-n", "sysctl.proc_translated"): self.translated,
            ("sysctl", "-n", "hw.perflevel0.physicalcpu"): self.performance,
            ("sysctl", "-n", "hw.perflevel1.physicalcpu"): self.efficiency,
            ("sysctl", "-n", "hw.memsize"): self.memory,
            ("sysctl", "-n", "iogpu.wired_limit_mb"): self.wired,
        }
        answer = answers[tuple(arguments)]
        if answer is None:
            raise subprocess.CalledProcessError(1, list(arguments), "", f"unknown oid '{arguments[-1]}'")
        return f"{answer}\n"

    def device(self) -> Mapping[str, object]:
        return {
            "resource_limit": 499000,
            "max_buffer_length": self.working_set // 4 * 3,
            "architecture": self.architecture,
            "memory_size": self.memory,
            "max_recommended_working_set_size": self.working_set,
            "device_name": self.chip,
        }

    def readers(self) -> Readers:
        return Readers(
            run=self.run,
            device=self.device,
            metal=lambda: self.metal,
            system=lambda: ("Darwin", self.processor, "3.12.11"),
            version=lambda name: self.versions[name],
            cores=lambda: self.performance + self.efficiency,
            memory=lambda: 1,  # not asked on a Mac
            compiles=lambda: self.compiles,
            disk=lambda: ("/Users/me/.cache/huggingface/hub", self.free),
            hub=lambda: self.hub,
        )

    def checks(self) -> dict[str, Check]:
        return {check.name: check for check in examine(self.readers())}


M1 = Mac("Apple M1", "applegpu_g13g", 4, 4, 8, 17179869184, 11453251584, "15.5")
M2_MAX = Mac("Apple M2 Max", "applegpu_g14s", 8, 4, 38, 34359738368, 22906503168, "26.1")
M4_PRO = Mac("Apple M4 Pro", "applegpu_g16s", 10, 4, 20, 51539607552, 40200896512, "26.5.2")
M5_MAX = Mac("Apple M5 Max", "applegpu_g17s", 6, 12, 40, 137438953472, 115448725504, "26.4")
MACS = {"M1": M1, "M2 Max": M2_MAX, "M4 Pro": M4_PRO, "M5 Max": M5_MAX}


@pytest.mark.parametrize("name", MACS)
def test_every_mac_of_ours_can_run_and_is_described(name: str) -> None:
    mac = MACS[name]
    checks = mac.checks()
    assert can_run(list(checks.values())) and "unknown" not in {check.status for check in checks.values()}
    assert checks["chip"].found == (
        f"Apple {name}, {mac.performance} performance cores, {mac.efficiency} efficiency cores, {mac.gpu} GPU cores"
    )
    assert checks["memory"].found == f"{mac.memory >> 30} GiB"
    assert checks["system"].found == f"macOS {mac.macos}"
    assert checks["python"] == Check("python", "ok", "3.12.11 for arm64")
    assert checks["hub"].found == "https://hub as somebody"


@pytest.mark.parametrize(
    ("name", "generation", "wide"), [("M1", 13, False), ("M2 Max", 14, False), ("M4 Pro", 16, True)]
)
def test_affine_quantisation_pays_from_generation_15_on(name: str, generation: int, wide: bool) -> None:
    gpu = MACS[name].checks()["gpu"]
    assert f"generation {generation}" in gpu.found
    assert gpu.status == ("ok" if wide else "warning")
    assert ("--mode nvfp4" in gpu.remedy) != wide
    third = replace(M1, architecture="applegpu_g15d").checks()["gpu"]
    assert third.status == "ok"


def test_matrix_units_need_an_m5_and_its_system() -> None:
    assert M5_MAX.checks()["matrix units"].status == "ok"
    old = replace(M5_MAX, macos="26.1").checks()["matrix units"]
    assert old.status == "warning" and "26.2" in old.remedy
    assert "matrix units" not in M4_PRO.checks()
    assert "matrix units" not in replace(M5_MAX, architecture="applegpu_g17p").checks()
    assert "matrix units" in replace(M5_MAX, architecture="applegpu_g18p").checks()


@pytest.mark.parametrize(
    ("mac", "status", "words"),
    [
        (M1, "ok", ("10.7 GiB (the system's choice)", "sysctl iogpu.wired_limit_mb=13926")),
        (M5_MAX, "ok", ("107.5 GiB (the system's choice)", "sysctl iogpu.wired_limit_mb=111411")),
        (replace(M2_MAX, wired=26624), "ok", ("26.0 GiB (set by hand)",)),
        (replace(M2_MAX, wired=32000), "warning", ("31.2 GiB (set by hand)", "wired_limit_mb=0")),
        (replace(M4_PRO, wired=None), "ok", ("37.4 GiB (the system's choice)",)),
    ],
)
def test_the_memory_of_the_gpu_is_its_limit_or_the_systems_choice(
    mac: Mac, status: str, words: tuple[str, ...]
) -> None:
    check = mac.checks()["gpu memory"]
    assert check.status == status
    assert all(word in f"{check.found} {check.means} {check.remedy}" for word in words)


def test_a_python_for_intel_is_the_problem_that_stops_everything() -> None:
    for translated, chip in ((1, "Apple M1"), (None, "VirtualApple @ 2.50GHz processor")):
        checks = replace(M1, processor="x86_64", translated=translated, chip=chip).checks()
        assert checks["python"].status == "problem" and "Rosetta" in checks["python"].found
        assert "arm64" in checks["python"].remedy and not can_run(list(checks.values()))
    intel = replace(M1, processor="x86_64", translated=None, chip="Intel(R) Core(TM) i9").checks()["python"]
    assert intel.status == "problem" and "Rosetta" not in intel.found and "M1 or later" in intel.remedy


@pytest.mark.parametrize(
    ("change", "name", "status", "words"),
    [
        ({"macos": "13.6.1"}, "system", "problem", "macOS 14"),
        ({"power": PMSET.format(mode=1)}, "power", "warning", "low power mode"),
        ({"power": PMSET.format(mode=0)}, "power", "ok", "no low power"),
        ({"power": "Currently in use:\n sleep 1\n"}, "power", "unknown", "pmset says nothing"),
        ({"metal": False}, "gpu", "warning", "no Metal GPU"),
        ({"architecture": "something new"}, "gpu", "unknown", "something new"),
        ({"versions": {"mlx": "0.32.2", "mlx-lm": "0.32.2"}}, "mlx", "problem", "heads of 512"),
        ({"versions": {"mlx": "0.33.0.dev2026", "mlx-lm": "0.32.2"}}, "mlx", "ok", "0.33.0"),
        ({"versions": {"mlx": "0.32.4", "mlx-lm": "0.33.0"}}, "mlx-lm", "problem", "<0.33"),
        ({"versions": {"mlx": "0.32.4", "mlx-lm": "0.31.3"}}, "mlx-lm", "problem", ">=0.32.2"),
        ({"versions": {}}, "mlx", "unknown", "mlx"),
        ({"compiles": False}, "compiler", "warning", "MLX_DISABLE_COMPILE"),
        ({"free": 5 * 10**9}, "disk", "warning", "5 GB free"),
        ({"hub": Hub("h", True, None, None)}, "hub", "warning", "HF_HUB_OFFLINE"),
        ({"hub": Hub("h", False, "does not answer", None)}, "hub", "warning", "h: does not answer"),
        ({"hub": Hub("h", False, None, None, refused=True)}, "hub", "warning", "refuses the token"),
        ({"hub": Hub("h", False, None, None)}, "hub", "ok", "gated models need one"),
    ],
)
def test_findings_are_judged_and_explained(change: dict[str, Any], name: str, status: str, words: str) -> None:
    checks = replace(M4_PRO, **change).checks()
    found = checks[name]
    assert found.status == status and words in f"{found.found} {found.means} {found.remedy}"
    assert can_run(list(checks.values())) == (status != "problem")
    if status in ("warning", "problem"):
        assert found.means and found.remedy


def test_a_warning_keeps_drafting_from_nothing() -> None:
    checks = list(replace(M1, power=PMSET.format(mode=1), free=0, compiles=False).checks().values())
    assert can_run(checks) and sum(check.status == "warning" for check in checks) == 4
    assert figures(checks)["can_run"] and len(figures(checks)["checks"]) == len(checks)


class BrokenError(Exception):
    """Of a kind that nobody expects."""


def _broken(*_: object) -> Any:
    raise BrokenError("out of order\nand more")


@pytest.mark.parametrize("reader", list(Readers.__dataclass_fields__))
def test_a_reader_that_fails_leaves_the_others_and_is_called_unknown(reader: str) -> None:
    whole = M5_MAX.readers()
    broken = replace(whole, **{reader: _broken})
    checks = examine(broken)
    assert all("\n" not in check.found for check in checks)
    if reader == "memory":
        return  # not asked on a Mac
    if reader == "metal":
        assert read(broken).metal is None and "out of order" in read(broken).failed["metal"]
        return
    if reader == "cores":
        assert {check.name: check for check in checks} == M5_MAX.checks()  # the finer numbers are there
        return
    assert "unknown" in {check.status for check in checks}
    assert can_run(checks)


def test_nothing_known_at_all_is_no_failure() -> None:
    checks = examine(Readers(*[_broken] * len(Readers.__dataclass_fields__)))
    assert checks and {check.status for check in checks} == {"unknown"} and can_run(checks)
    assert any("out of order" in check.found for check in checks)


def test_strange_answers_are_unknown_and_not_believed() -> None:
    strange = replace(M4_PRO.readers(), run=lambda _: "???", device=lambda: {"architecture": 7, "device_name": None})
    found = {check.name: check.status for check in examine(strange)}
    assert found["gpu"] == found["system"] == found["power"] == found["memory"] == found["gpu memory"] == "unknown"


def test_low_power_mode_is_read_under_both_names() -> None:
    assert low_power(PMSET.format(mode=1)) and not low_power(PMSET.format(mode=0))
    assert low_power(" powermode            1\n") and not low_power(" powermode            2\n")
    for text in ("", "Sleep On Power Button 1"):
        with pytest.raises(ValueError, match="says nothing"):
            low_power(text)
    assert numbers("26.1\n") == (26, 1) and numbers("0.32.4.dev1+g2") == (0, 32, 4)


LINUX = Readers(
    run=lambda _: pytest.fail("no program of macOS is run here"),
    device=lambda: {"architecture": "x86_64", "device_name": "AMD EPYC"},
    metal=lambda: False,
    system=lambda: ("Linux", "x86_64", "3.12.3"),
    version=lambda name: {"mlx": "0.32.4", "mlx-lm": "0.32.2"}[name],
    cores=lambda: 16,
    memory=lambda: 64 << 30,
    compiles=lambda: False,
    disk=lambda: ("/cache", 10**12),
    hub=lambda: Hub("https://hub", False, None, None),
)


def test_linux_can_run_and_needs_a_compiler() -> None:
    checks = {check.name: check for check in examine(LINUX)}
    assert can_run(list(checks.values())) and checks["system"].status == checks["compiler"].status == "warning"
    assert checks["chip"].found == "AMD EPYC, 16 cores" and checks["memory"].found == "64 GiB"
    assert "g++" in checks["compiler"].remedy
    assert not checks.keys() & {"gpu", "gpu memory", "power", "matrix units"}


# --------------------------------------------------------------------------- the machine that this runs on


def test_this_machine_is_examined_without_a_failure(hub: Loopback) -> None:
    facts = read(this_machine())
    assert facts.memory and facts.cores and facts.mlx and facts.mlx_lm and facts.disk and facts.disk[1] > 0
    assert facts.compiles is not None and facts.hub == Hub(hub.url, False, None, None)


class Answer:
    """Of a hub that refuses."""

    def __init__(self, status: int):
        self.status_code, self.headers, self.request = status, dict[str, str](), None


def whoami(self: HfApi, token: str) -> dict[str, str]:
    if token == "good":
        return {"name": "me"}
    answer: Any = Answer(401 if token == "bad" else 500)
    raise HfHubHTTPError("no", response=answer)


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("good", {"user": "me"}),
        ("bad", {"refused": True}),
        ("broken", {"problem": "answers with status 500"}),
    ],
)
def test_a_token_is_shown_to_the_hub(
    token: str, expected: dict[str, Any], hub: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get_token", lambda: token)
    monkeypatch.setattr(HfApi, "whoami", whoami)
    assert read(this_machine()).hub == Hub(hub.url, False, None, None)._replace(**expected)


def test_a_hub_that_is_turned_off_or_away_is_told_apart(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    away = read(this_machine()).hub
    assert away is not None and away.problem is not None and "does not answer" in away.problem
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read(this_machine()).hub == Hub("http://127.0.0.1:9", True, None, None)


def test_the_cache_need_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    disk = read(this_machine()).disk
    assert disk is not None and disk[0].endswith("yet") and disk[1] > 0


@pytest.mark.parametrize(("machine", "code"), [(M4_PRO, 0), (replace(M4_PRO, macos="12.7"), 1)])
def test_the_command_reports_and_its_exit_code_says_whether_drafting_works(
    machine: Mac, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "this_machine", machine.readers)
    report = CliRunner().invoke(app, ["doctor"])
    assert report.exit_code == code, report.output
    assert ("Drafting works here." in report.stdout) == (code == 0)
    assert all(check.found in report.stdout for check in machine.checks().values())
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    answer = json.loads(as_json.stdout)
    assert as_json.exit_code == code and answer["can_run"] == (code == 0) and answer["versions"]["mlx"]
    assert {check["name"] for check in answer["checks"]} == machine.checks().keys()
