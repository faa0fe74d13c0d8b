"""What a client may ask for at most: bytes, counts and seconds, as one value."""

from dataclasses import dataclass

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of one server."""

    body: int = 32 * MIB  # bytes of a request
    nesting: int = 64  # brackets within brackets in its JSON
    header: int = 32 * KIB  # bytes of a request line and its headers
    arrival: float = 30.0  # seconds in which headers have to be there, and then the body
    connections: int = 128
    choices: int = 16  # texts that one request may ask for, prompts times n
    tools: int = 512
    tools_size: int = 2 * MIB  # bytes of their schemas
    schema: int = 256 * KIB  # bytes of a schema or grammar
    ping: float = 15.0  # seconds of silence after which a stream shows a sign of life
    patience: float = 0.3  # seconds to wait for an error before a stream's headers go out
    grace: float = 10.0  # seconds that running requests have to end when the server stops
