"""Single tokens as text and bytes: a character may take several of them."""

import re
from functools import cache

from mlx_lm.tokenizer_utils import TokenizerWrapper

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_text(tokenizer: TokenizerWrapper, token: int) -> str:
    """A token by itself; U+FFFD stands for bytes that are no whole character."""
    return str(tokenizer.decode([token]))


def token_bytes(tokenizer: TokenizerWrapper, token: int) -> list[int]:
    """The bytes of a token, which need not be whole characters."""
    text = token_text(tokenizer, token)
    if "\ufffd" not in text:
        return list(text.encode())
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if found := _BYTE.fullmatch(piece):
        return [int(found[1], 16)]
    table = _byte_of()
    return [table[character] for character in piece] if table.keys() >= set(piece) else list(text.encode())


@cache
def _byte_of() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte: itself if it can be seen, else one from U+0100."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(unseen)}
