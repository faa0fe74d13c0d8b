"""What tokenizers are given is text, and special tokens come once."""

from types import SimpleNamespace
from typing import cast

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.errors import RequestError
from mtp_mlx.prompts import check_text, lacks_special


def test_text_that_utf_8_cannot_hold_is_refused_by_its_name() -> None:
    check_text("Grüße, 世界\x00")
    with pytest.raises(RequestError, match="the prompt is not text that UTF-8 can hold"):
        check_text("\udcff")
    with pytest.raises(RequestError, match="the suffix is not text"):
        check_text("a\ud800", "suffix")


@pytest.mark.parametrize(
    ("bos", "text", "lacks"),
    [("<bos>", "a<bos>", True), ("<bos>", "<bos>a", False), ("<bos>", "", True), (None, "<bos>a", True)],
)
def test_special_tokens_are_lacking_unless_a_text_begins_with_its_own(bos: str | None, text: str, lacks: bool) -> None:
    tokenizer = cast(TokenizerWrapper, SimpleNamespace(bos_token=bos))
    assert lacks_special(tokenizer, text) == lacks
