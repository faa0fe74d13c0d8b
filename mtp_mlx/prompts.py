"""What may be given to a tokenizer, and whether it adds special tokens."""

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.errors import RequestError


def check_text(text: str, what: str = "prompt") -> None:
    """Raises RequestError for text that came from bytes that are no UTF-8; tokenizers cannot take it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the {what} is not text that UTF-8 can hold ({error.reason})") from None


def lacks_special(tokenizer: TokenizerWrapper, text: str) -> bool:
    """Whether special tokens go around a prompt: as in mlx-lm, not where it begins with BOS by itself."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
