"""One engine in a process of its own: reads requests as JSON lines, writes texts, answers with tokens and times.

bench/against.py starts it, once for each engine, with the Python of that engine's environment:

    python worker.py ours|mlx-lm|mlx-vlm TARGET DRAFTER DTYPE

So it imports only what the engine itself needs. A request is {"prompt": ids, "tokens": most, "stop": ids, "depth": k,
"truth": ids}: with a depth, k tokens are drafted in every round, by the drafter, or handed over from `truth`, the
text as plain decoding writes it, if it is given. The answer has the tokens, the number of the round that each came
in, and when, in seconds from the request.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

DTYPES = {"auto": None, "float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
Request = dict[str, Any]
Engine = Callable[[Request], Iterator[tuple[int, int]]]  # -> every token, and the number of its round


def ours(target: str, drafter: str, dtype: str) -> Engine:
    import mtp_mlx
    from mtp_mlx.choosing import Rules
    from mtp_mlx.ngram import NOBODY
    from mtp_mlx.sequence import Sequence

    loaded, tokenizer = mtp_mlx.load(target, drafter=drafter, dtype=DTYPES[dtype])
    pair = loaded.pair

    def write(request: Request) -> Iterator[tuple[int, int]]:
        options = {"max_tokens": request["tokens"], "depth": request["depth"], "lookup": False}
        for response in mtp_mlx.stream_generate(pair, tokenizer, request["prompt"], **options):
            yield response.token, response.stats.rounds

    def recite(request: Request) -> Iterator[tuple[int, int]]:
        truth, done, number = request["truth"], 0, 0
        sequence = Sequence(mtp_mlx.Pair(pair.target, NOBODY, pair.programs), Rules())
        sequence.prefill(request["prompt"], 2048, lambda read, total: None)
        while done < request["tokens"]:
            number += 1
            known = truth[done : min(done + request["depth"], request["tokens"] - 1)]
            for token in sequence.round(known if number > 1 else 0).tokens:
                done += 1
                yield token, number

    return lambda request: recite(request) if request["truth"] else write(request)


def mlx_lm(target: str, drafter: str, dtype: str) -> Engine:
    import mlx_lm

    model, tokenizer = mlx_lm.load(target)
    _recast(dtype, model)

    def write(request: Request) -> Iterator[tuple[int, int]]:
        responses = mlx_lm.stream_generate(model, tokenizer, request["prompt"], request["tokens"])
        yield from ((response.token, i) for i, response in enumerate(responses, 1))

    return write


def mlx_vlm(target: str, drafter: str, dtype: str) -> Engine:
    from mlx_vlm.generate import generate_step, generation_stream, wired_limit
    from mlx_vlm.speculative.drafters import load_drafter
    from mlx_vlm.utils import load_model

    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(_with_vision_config(Path(target), Path(scratch)))
    own, kind = load_drafter(drafter)
    _recast(dtype, model, own)

    class Oracle:
        """To mlx-vlm's own loop it is a drafter like any other; its drafts are the text itself."""

        supports_greedy_draft_argmax = True
        prefer_requested_block_size = True

        def __init__(self, text: list[int]):
            self.text, self.config = text, own.config
            self.accept_lens: list[int] = []
            self.draft_lens: list[int] = []

        def reset(self, target_model: Any) -> None:
            pass

        def set_shared_kv(self, shared: Any, kv_offset: int, **_: Any) -> None:
            self.known = kv_offset + 1

        def draft_block(self, last: Any, hidden: Any, cache: Any, block: int, sampler: Any, kind: Any, **_: Any) -> Any:
            drafts = self.text[self.known : self.known + block - 1]
            return mx.array([drafts + [0] * (block - 1 - len(drafts))], kind)

    def write(request: Request) -> Iterator[tuple[int, int]]:
        options: dict[str, Any] = {"max_tokens": request["tokens"], "temperature": 0.0}
        chosen = Oracle(request["prompt"] + request["truth"]) if request["truth"] else own
        if request["depth"]:
            options |= {"draft_model": chosen, "draft_kind": kind, "draft_block_size": request["depth"] + 1}
        with wired_limit(model, [generation_stream]):
            steps = generate_step(mx.array([request["prompt"]]), model, None, None, **options)
            for i, (token, _) in enumerate(steps, 1):
                yield int(token), 1 + len(chosen.accept_lens) if request["depth"] and i > 1 else i

    return write


def _recast(dtype: str, *models: Any) -> None:
    for model in models:
        if dtype != "auto":
            model.set_dtype(DTYPES[dtype])


def _with_vision_config(folder: Path, scratch: Path) -> Path:
    """A checkpoint whose config says that it has no vision tower, as mlx-vlm wants to read it: {} in place of null."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("vision_config", {}) is not None:
        return folder
    for file in folder.resolve().iterdir():
        if file.name != "config.json":
            (scratch / file.name).symlink_to(file)
    (scratch / "config.json").write_text(json.dumps(config | {"vision_config": {}}))
    return scratch


ENGINES = {"ours": (ours, "mtp-mlx"), "mlx-lm": (mlx_lm, "mlx-lm"), "mlx-vlm": (mlx_vlm, "mlx-vlm")}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # some libraries print
    name, *where = sys.argv[1:]
    build, package = ENGINES[name]
    engine = build(*where)
    versions = {name: version(name) for name in (package, "mlx")}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(engine, json.loads(line))), file=answers, flush=True)


def _answer(engine: Engine, request: Request) -> dict[str, list[Any]]:
    began = time.perf_counter()
    came: list[tuple[int, int, float]] = []
    for token, number in engine(request):
        came.append((token, number, time.perf_counter() - began))
        if token in request["stop"]:
            break
    tokens, rounds, seconds = zip(*came, strict=True)
    return {"tokens": tokens, "rounds": rounds, "seconds": seconds}


if __name__ == "__main__":
    main()
