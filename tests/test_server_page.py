import re
from pathlib import Path

from served import Served
from served import _shared as _shared  # fixtures
from served import served as served

PAGE = Path(__file__).parent.parent / "mtp_mlx" / "server" / "page.html"


def test_the_page_is_served_to_browsers_and_may_load_and_ask_nothing_elsewhere(served: Served) -> None:
    answer = served.client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.text == PAGE.read_text("utf-8")
    policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    sources = {source for sources in policy.values() for source in sources.split()}
    assert sources <= {"'none'", "'self'", "'unsafe-inline'", "data:"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert served.client.head("/").status_code == 200


def test_the_page_names_nothing_outside_itself() -> None:
    page = PAGE.read_text("utf-8")
    assert not re.findall(r"(?:https?:|wss?:)?//[\w.]", page)
    assert set(re.findall(r"(?:src|href|action)=\"([^\"]*)\"", page)) == {"data:,"}
    assert not re.findall(r"@import|url\(|import\(|<script [^>]*src|<link rel=\"stylesheet", page)
    asked = set(re.findall(r"fetch\(\"([^\"]*)\"", page)) | set(re.findall(r"\"(v1/[^\"]*)\"", page))
    assert asked == {"v1/models", "v1/chat/completions", "v1/completions"}


def test_every_part_that_the_page_looks_for_is_in_it() -> None:
    page = PAGE.read_text("utf-8")
    ids = re.findall(r"\bid=\"(\w+)\"", page)
    assert len(ids) == len(set(ids)) and set(re.findall(r"\$\(\"(\w+)\"\)", page)) <= set(ids)


def test_model_text_is_never_read_as_markup() -> None:
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", PAGE.read_text("utf-8"))


def test_what_the_page_reads_of_chunks_is_on_the_wire(served: Served) -> None:
    """`take`, `report` and `connect` of the page."""
    model = served.client.get("/v1/models").json()["data"][0]
    assert model["id"] and "chat" in model["capabilities"] and "drafter" in model["meta"]
    said = served.says("<think>\nI see\n</think>\n\nHello there<|im_end|>")
    chunks = said.stream("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], show_drafts=True, depth=0)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    told = [pair for chunk in chunks for pair in chunk.get("drafts", ())]
    assert {origin for _, origin in told} <= {"plain", "accepted", "copied", "correction", "bonus"}
    assert "Hello there" in "".join(text for text, _ in told)
    _ends_with_figures(chunks)
    _ends_with_figures(served.says("Hello").stream("/v1/completions", prompt="x", show_drafts=True, depth="auto"))


def _ends_with_figures(chunks: list[dict[str, object]]) -> None:
    assert [i for i, chunk in enumerate(chunks) if "speculation" in chunk] == [len(chunks) - 1]
    last = chunks[-1]
    timings, speculation = last["timings"], last["speculation"]
    assert isinstance(timings, dict) and isinstance(speculation, dict)
    assert timings.keys() >= {"predicted_per_second", "predicted_n", "draft_n", "draft_n_accepted", "cache_n"}
    assert speculation.keys() >= {"accepted_per_position", "tokens_per_round", "depth", "reason", "alarm"}
