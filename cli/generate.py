"""`mtp-mlx generate`: text on stdout as it is accepted, everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer

from mtp_mlx.choosing import Drafts
from mtp_mlx.cli.display import Notes, PromptBar, Writer, note, stats_table, versions
from mtp_mlx.cli.group import Backend, join
from mtp_mlx.cli.options import (
    Adapter,
    Depth,
    Drafter,
    DrafterBits,
    Dtype,
    KvBits,
    MinP,
    Model,
    Parts,
    Temperature,
    TopK,
    TopP,
    check_drawn,
    parse_depth,
)
from mtp_mlx.conversation import in_chat_template
from mtp_mlx.errors import RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.generation import Response
from mtp_mlx.hub import DEMO, DEMOS
from mtp_mlx.loading import Loaded
from mtp_mlx.options import DEFAULT_MAX_TOKENS, DEFAULT_PREFILL_STEP
from mtp_mlx.penalties import Penalties
from mtp_mlx.prompts import check_text
from mtp_mlx.sampling import Sample, Sampler, choose_sampler

DEFAULT_PENALTY_CONTEXT = 20
DEFAULT_XTC_THRESHOLD = 0.1
DEMO_PROMPT = '''\
import unittest


class TestStack(unittest.TestCase):
    """Tests of a stack."""

    def test_push(self):'''


def command(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; left out or '-', it is read from standard input.")
    ] = None,
    model: Model = DEMO,
    drafter: Drafter = "auto",
    adapter: Adapter = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", "-m", help="Tokens to generate; -1 for as many as the context holds."),
    ] = DEFAULT_MAX_TOKENS,
    depth: Depth = "auto",
    temp: Temperature = 0.0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    top_k: TopK = 0,
    xtc_probability: Annotated[
        float, typer.Option(help="How often the most probable choices are left out (XTC); 0 is off.")
    ] = 0.0,
    xtc_threshold: Annotated[float, typer.Option(help="Probability from which XTC counts a token as a choice.")] = (
        DEFAULT_XTC_THRESHOLD
    ),
    repetition_penalty: Annotated[
        float, typer.Option(help="Divide the logits of recent tokens by this (multiply negative ones); 1 is off.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Subtract this from the logit of every recent token; 0 is off.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Subtract this for every recent occurrence of a token; 0 is off.")
    ] = 0.0,
    penalty_context: Annotated[int, typer.Option(help="How many tokens back the three penalties look.")] = (
        DEFAULT_PENALTY_CONTEXT
    ),
    logit_bias: Annotated[
        list[str] | None, typer.Option(help="ID=VALUE is added to the logit of token ID; give it once for each.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the sampling: the same text on every run and at every depth. Default: a new one."),
    ] = None,
    drafts: Annotated[
        str,
        typer.Option(
            help="How drafts are drawn at a temperature: 'coupled' with the target's own noise, 'argmax', or "
            "'sampled' and tested by rejection; 'auto' couples them if there is a seed. The law is the target's always."
        ),
    ] = "auto",
    draft_temp: Annotated[
        float | None, typer.Option(help="Temperature of 'sampled' drafts; default: that of the target.")
    ] = None,
    lookup: Annotated[
        bool, typer.Option(help="Try what followed an earlier occurrence of the latest tokens, where that pays.")
    ] = True,
    prediction: Annotated[
        Path | None, typer.Option(help="File with text that the output will mostly repeat; tried as drafts.")
    ] = None,
    dtype: Dtype = "auto",
    drafter_bits: DrafterBits = "auto",
    kv_bits: KvBits = "none",
    backend: Backend = "any",
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Continue the prompt as plain text.")
    ] = False,
    prefill_step_size: Annotated[
        int, typer.Option(help="Prompt tokens to read at a time; fewer take less memory.")
    ] = DEFAULT_PREFILL_STEP,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour accepted drafts, corrections and bonus tokens.")
    ] = False,
    stats: Annotated[bool, typer.Option(help="Print a table of figures on stderr afterwards.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Report what is decided about the files.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in place of the text and the table.")
    ] = False,
) -> None:
    """Generate text, with a drafter guessing ahead and the target keeping only what it would have written.

    Example: mtp-mlx generate "def fibonacci(n):" --depth 4 --show-drafts
    """
    if show_drafts and as_json:
        raise RequestError("--show-drafts colours the text, and --json prints none; leave one out")
    parsed_depth = parse_depth(depth)
    if prediction is not None and parsed_depth == 0:
        raise RequestError(f"--prediction {prediction} is tried as drafts, and --depth 0 allows none; leave one out")
    sampler = choose_sampler(temp, top_p, min_p, top_k, xtc_probability=xtc_probability, xtc_threshold=xtc_threshold)
    check_drawn(temp, top_p=(top_p, 1), min_p=(min_p, 0), top_k=(top_k, 0), xtc_probability=(xtc_probability, 0))
    if xtc_threshold != DEFAULT_XTC_THRESHOLD and not xtc_probability:
        raise RequestError(f"--xtc-threshold {xtc_threshold:g} is for --xtc-probability above 0; give that too")
    write = partial(
        stream_generate,
        max_tokens=max_tokens,
        depth=parsed_depth,
        sampler=sampler,
        penalties=parse_penalties(
            repetition_penalty, presence_penalty, frequency_penalty, penalty_context, logit_bias or []
        ),
        seed=seed,
        drafts=parse_drafts(drafts, sampler, draft_temp),
        lookup=lookup,
        prediction=None if prediction is None else _read_file(prediction),
        prefill_step_size=prefill_step_size,
    )
    group = join(backend)
    if group is not None and prompt in (None, "-"):
        raise RequestError("mlx.launch never ends standard input; give the prompt as an argument")
    text = _read_prompt(prompt, model)
    parts = Parts(model, drafter, dtype, drafter_bits, kv_bits, adapter)
    _run(parts, group, text, write, _Manner(show_drafts, stats, verbose, as_json, ignore_chat_template))


@dataclass(frozen=True)
class _Manner:
    """What a user wants to see, and how the prompt is meant."""

    show_drafts: bool
    stats: bool
    verbose: bool
    as_json: bool
    plain_prompt: bool


def _run(
    parts: Parts,
    group: mx.distributed.Group | None,
    text: str,
    write: Callable[..., Iterator[Response]],
    manner: _Manner,
) -> None:
    speaks = group is None or group.rank() == 0
    with Notes(manner.verbose) as notes, PromptBar() as bar:
        loaded = parts.load(group)
        # In a JSON object the drafter is among the figures.
        surprising = speaks and parts.drafter == "auto" and not loaded.expected and not manner.as_json
        if manner.verbose or surprising:
            note(f"drafter: {loaded.drafter or 'none'} ({loaded.drafter_reason})")
        if loaded.adapter:
            note(f"adapter: {loaded.adapter}")
        notes.show()
        prompt = text if manner.plain_prompt else in_chat_template(loaded.tokenizer, text)
        responses = write(loaded.pair, loaded.tokenizer, prompt, prompt_progress_callback=bar)
        if not speaks:
            _follow(responses)
        elif manner.as_json:
            _print_json(responses, loaded)
        else:
            _print_text(responses, manner.show_drafts, loaded if manner.stats else None)


def parse_penalties(
    repetition: float, presence: float, frequency: float, context: int, bias: Iterable[str]
) -> Penalties:
    """The penalties over so many recent tokens, and the bias. Raises RequestError for what would not be used."""
    if context != DEFAULT_PENALTY_CONTEXT and (repetition, presence, frequency) == (1.0, 0.0, 0.0):
        raise RequestError(
            f"--penalty-context {context} is for --repetition-penalty, --presence-penalty or --frequency-penalty; "
            "give one of them too"
        )
    return Penalties(
        repetition=repetition,
        repetition_context=context,
        presence=presence,
        presence_context=context,
        frequency=frequency,
        frequency_context=context,
        bias=parse_bias(bias),
    )


def parse_drafts(name: str, sampler: Sampler, temperature: float | None) -> Drafts | None:
    """How drafts are drawn. Raises RequestError for an unknown name, or a temperature that would not be used."""
    if name not in ("auto", "coupled", "argmax", "sampled"):
        raise RequestError(f"--drafts {name} is not one of auto, coupled, argmax, sampled")
    if name != "sampled" and temperature is not None:
        raise RequestError(f"--draft-temp {temperature} is for --drafts sampled; {name} drafts do not use it")
    if temperature is not None and not isinstance(sampler, Sample):
        raise RequestError(f"--draft-temp {temperature} is for texts with --temp above 0; at 0 nothing is drawn")
    if name == "sampled" and isinstance(sampler, Sample):
        return sampler if temperature is None else replace(sampler, temperature=temperature)
    if name == "auto":
        return None
    return "argmax" if name == "argmax" else "coupled"  # at temperature 0 they are the same


def parse_bias(given: Iterable[str]) -> tuple[tuple[int, float], ...]:
    """Pairs of token and bias from ID=VALUE. Raises RequestError for anything else."""
    pairs: list[tuple[int, float]] = []
    for entry in given:
        token, _, value = entry.partition("=")
        try:
            pairs.append((int(token), float(value)))
        except ValueError:
            raise RequestError(f"--logit-bias {entry} is not ID=VALUE, a token id and a number") from None
    return tuple(pairs)


def _read_file(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error})") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def _read_prompt(prompt: str | None, model: str) -> str:
    if prompt is not None and prompt != "-":
        check_text(prompt)
        return prompt
    if sys.stdin is None:
        raise RequestError("no prompt, and standard input is closed; give the prompt as an argument")
    if prompt is None and sys.stdin.isatty():
        if model not in DEMOS:
            raise RequestError("no prompt; give one as an argument or on standard input")
        sys.stdout.write(DEMO_PROMPT)
        return DEMO_PROMPT
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text ({error}); give the prompt as UTF-8") from None


def _follow(responses: Iterator[Response]) -> None:
    """Compute this machine's part of a text that another one prints."""
    for _ in responses:
        pass


def _print_text(responses: Iterator[Response], show_drafts: bool, loaded: Loaded | None) -> None:
    """The text, and the table of what was loaded."""
    writer = Writer(show_drafts)
    for response in responses:
        writer.write(response.text, response.origin)
        last = response
    writer.finish()
    if loaded:
        drafter = f"{loaded.drafter or 'none'} ({loaded.drafter_reason})"
        parts = {"drafter": drafter} | ({"adapter": loaded.adapter} if loaded.adapter else {})
        parts |= {"machines": str(loaded.held)} if loaded.held else {}
        stats_table(last.stats, last.finish_reason, parts, show_drafts)


def _print_json(responses: Iterator[Response], loaded: Loaded) -> None:
    texts: list[str] = []
    tokens: list[int] = []
    # The responses themselves are not kept: each holds a row of log-probabilities.
    for response in responses:
        texts.append(response.text)
        tokens.append(response.token)
        last = response
    answer: dict[str, Any] = {
        "text": "".join(texts),
        "tokens": tokens,
        **last.stats.figures(),
        "finish_reason": last.finish_reason,
        "model": loaded.target,
        "drafter": loaded.drafter,
        "drafter_reason": loaded.drafter_reason,
        "adapter": loaded.adapter,
        "machines": loaded.held.size if loaded.held else 1,
        "versions": versions(),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
