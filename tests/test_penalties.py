"""Penalties equal mlx-lm's logits processors, row by row and bit for bit."""

import math
from collections.abc import Callable
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from conftest import mlx_lm_processors, needs_compiler

from mtp_mlx.errors import RequestError
from mtp_mlx.penalties import Penalties, windows

V = 12
EACH = [
    Penalties(bias=((3, 1.7), (0, -2.3))),
    Penalties(bias=((3, -math.inf),)),
    Penalties(repetition=1.3),
    Penalties(repetition=0.7, repetition_context=3),
    Penalties(presence=0.37, presence_context=5),
    Penalties(frequency=0.37, frequency_context=7),
    Penalties(frequency=-0.21),
    Penalties(repetition=1.2, repetition_context=8, presence=0.4, presence_context=3),
]
ALL = Penalties(1.17, 4, -0.4, 9, 0.13, 6, ((5, 0.9), (7, -11.0)))


def _by_mlx_lm(penalties: Penalties, logits: mx.array, text: list[int]) -> mx.array:
    """One row (V,) after a text."""
    processors = mlx_lm_processors(penalties)
    row = mx.array(logits)[None]  # a copy: mlx-lm writes in place
    for processor in processors:
        row = processor(mx.array(text, mx.int32), row)
    return row[0]


def _bits(x: mx.array) -> list[int]:
    """As integers, so that -0.0 is not 0.0."""
    return x.view(mx.uint16 if x.dtype == mx.bfloat16 else mx.uint32).flatten().tolist()  # type: ignore[return-value]


@pytest.mark.parametrize(("penalties", "dtype"), [*product([*EACH, ALL], [mx.float32, mx.bfloat16])])
def test_every_row_equals_mlx_lm_after_its_own_text(penalties: Penalties, dtype: mx.Dtype) -> None:
    _compare_with_mlx_lm(penalties, dtype, penalties)


@needs_compiler
@pytest.mark.usefixtures("compiled")
def test_compiled_penalties_equal_mlx_lms() -> None:
    _compare_with_mlx_lm(ALL, mx.bfloat16, mx.compile(ALL))
    history, block = mx.array([[7, 8, 9], [-1, -1, 2]]), mx.array([[4, 5], [6, 3]])
    assert mx.compile(windows)(history, block).tolist() == windows(history, block).tolist()


def _compare_with_mlx_lm(
    penalties: Penalties, dtype: mx.Dtype, apply: Callable[[mx.array, mx.array], mx.array]
) -> None:
    random = np.random.default_rng(1)
    logits = mx.array(random.normal(size=(3, 5, V)) * 3).astype(dtype)
    block = random.integers(0, V, (3, 5))
    # Texts of different lengths, one empty; few ids, so that they repeat.
    texts = [random.integers(0, V, n).tolist() for n in (0, 4, 30)]
    history = mx.array([([-1] * 30 + text)[len(text) :] for text in texts], mx.int32)
    history = history[:, 30 - penalties.reach :]

    ours = apply(logits, windows(history, mx.array(block, mx.int32)))
    assert ours.dtype == dtype
    for b, text in enumerate(texts):
        for j in range(5):
            theirs = _by_mlx_lm(penalties, logits[b, j], text + block[b, : j + 1].tolist())
            assert _bits(ours[b, j]) == _bits(theirs)


@pytest.mark.parametrize("penalties", [p for p in EACH if p.reach])
def test_without_a_text_no_logit_changes(penalties: Penalties) -> None:
    logits = mx.array([[[-0.0, 1.5, -2.5] + [0.0] * (V - 3)]])
    nothing = mx.full((1, 1, penalties.reach), -1, mx.int32)
    assert _bits(penalties(logits, nothing)) == _bits(logits)


def test_a_missing_token_touches_no_id() -> None:
    """Neither the first nor the last id, which -1 might be taken for, whether or not they occur themselves."""
    logits = mx.full((1, 1, V), 3.0)
    for text in ([4], [0, 4], [4, V - 1], [0, V - 1]):
        recent = mx.array([[[-1] * (20 - len(text)) + text]], mx.int32)
        for penalties in (Penalties(repetition=2.0), Penalties(presence=1.5), Penalties(frequency=1.5)):
            expected = [1.5 if token in text else 3.0 for token in range(V)]
            assert penalties(logits, recent)[0, 0].tolist() == expected


def test_a_banned_token_has_no_probability() -> None:
    logits = Penalties(bias=((2, -math.inf),))(mx.zeros((1, 2, V)), mx.zeros((1, 2, 0), mx.int32))
    assert mx.softmax(logits, axis=-1)[..., 2].tolist() == [[0.0, 0.0]]


def test_windows_end_with_the_token_before_the_choice() -> None:
    history, block = mx.array([[7, 8, 9], [-1, -1, 2]]), mx.array([[4, 5], [6, 3]])
    assert windows(history, block).tolist() == [[[8, 9, 4], [9, 4, 5]], [[-1, 2, 6], [2, 6, 3]]]
    assert windows(history[:, :1], block).tolist() == [[[4], [5]], [[6], [3]]]
    assert windows(history[:, :0], block).shape == (2, 2, 0)


def test_reach_is_the_longest_context_in_use() -> None:
    assert Penalties().reach == 0 and not Penalties()
    assert Penalties(repetition_context=90).reach == 0 and not Penalties(repetition_context=90)
    assert Penalties(bias=((1, 1.0),)).reach == 0 and Penalties(bias=((1, 1.0),))
    assert ALL.reach == 9 and ALL
    assert Penalties(frequency=0.1, presence_context=50, frequency_context=6).reach == 6


def test_equal_penalties_are_one_key_of_a_table() -> None:
    assert {Penalties(bias=((1, 2.0),)): 1}[Penalties(bias=((1, 2.0),))] == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"repetition": 0.0}, "repetition"),
        ({"repetition": math.inf}, "repetition"),
        ({"repetition": math.nan}, "repetition"),
        ({"presence": math.inf}, "presence"),
        ({"frequency": math.nan}, "frequency"),
        ({"repetition_context": 0}, "repetition context"),
        ({"presence_context": -1}, "presence context"),
        ({"frequency_context": 0}, "frequency context"),
        ({"bias": ((-1, 1.0),)}, "-1"),
        ({"bias": ((4, 1.0), (4, 2.0))}, "more than once"),
        ({"bias": ((4, math.nan),)}, "nan"),
        ({"bias": ((4, math.inf),)}, "inf"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, float], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        Penalties(**options)  # type: ignore[arg-type]


def test_a_bias_on_an_unknown_id_is_refused() -> None:
    Penalties(bias=((V - 1, 1.0),)).check(V)
    with pytest.raises(RequestError, match="12"):
        Penalties(bias=((V, 1.0),)).check(V)
