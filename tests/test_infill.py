"""What is to be filled in is marked up as the model has learned it, and no text in it is taken for a marker."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from replies import tokenizer

from mtp_mlx.errors import RequestError
from mtp_mlx.infill import Infill, find_infill, plain

MARKERS = [
    *("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<|endoftext|>", "<|im_end|>", "<think>"),
]
WRAPPER = TokenizerWrapper(tokenizer(*MARKERS))


def _text(ids: list[int]) -> str:
    text: str = WRAPPER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _infill(wrapper: TokenizerWrapper = WRAPPER) -> Infill:
    found = find_infill(wrapper.get_vocab())
    assert found is not None
    return found


def test_prefix_and_suffix_come_before_the_middle() -> None:
    ids = _infill().prompt(WRAPPER, "def f(", "):\n")
    assert _text(ids) == "<|fim_prefix|>def f(<|fim_suffix|>):\n<|fim_middle|>"
    assert _text(_infill().prompt(WRAPPER, "", "")) == "<|fim_prefix|><|fim_suffix|><|fim_middle|>"


def test_other_files_come_first_with_their_names() -> None:
    extra = [("a.py", "x = 1\n"), ("b.py", "y = 2")]
    assert _text(_infill().prompt(WRAPPER, "z", "", extra, repository="library", path="c.py")) == (
        "<|repo_name|>library\n<|file_sep|>a.py\nx = 1\n<|file_sep|>b.py\ny = 2\n<|file_sep|>c.py\n"
        "<|fim_prefix|>z<|fim_suffix|><|fim_middle|>"
    )


def test_every_end_that_the_vocabulary_has_stops() -> None:
    names = {"<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|im_end|>"}
    assert _infill().stops == {WRAPPER.get_vocab()[name] for name in names}
    few = find_infill({"<|fim_prefix|>": 1, "<|fim_suffix|>": 2, "<|fim_middle|>": 3, "<|im_end|>": 4})
    assert few == Infill(1, 2, 3, None, None, frozenset({4}))


def test_a_vocabulary_without_markers_cannot_fill_in() -> None:
    assert find_infill({"<|fim_prefix|>": 1, "<|fim_suffix|>": 2}) is None


def test_other_files_need_markers_of_their_own() -> None:
    with pytest.raises(RequestError, match="leave them out"):
        Infill(1, 2, 3, None, None, frozenset()).prompt(WRAPPER, "a", "b", [("a.py", "")])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.sampled_from([*MARKERS, "<|fim", "_prefix|>", "<"]), st.text(max_size=4)), max_size=12))
def test_markers_in_a_text_are_mere_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = plain(WRAPPER, text)
    assert _text(ids) == text
    assert not set(ids) & set(WRAPPER.added_tokens_decoder)


def test_markers_that_overlap_are_mere_text() -> None:
    wrapper = TokenizerWrapper(tokenizer("<t>", "t><"))
    assert not set(plain(wrapper, "<t><t>")) & set(wrapper.added_tokens_decoder)


def test_a_text_without_markers_is_encoded_as_a_whole() -> None:
    assert plain(WRAPPER, "the tool call thought") == WRAPPER.encode("the tool call thought", add_special_tokens=False)


def test_text_that_no_utf8_holds_is_refused() -> None:
    with pytest.raises(RequestError, match="UTF-8"):
        plain(WRAPPER, "a\ud800")
