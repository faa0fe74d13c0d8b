"""What was seen of a client."""

from typing import NamedTuple


class Report(NamedTuple):
    """The columns of the table: each is "yes", "-" where a client has no such thing, or what happened instead."""

    version: str
    streams: str
    stops: str
    calls: str
    continues: str
    remarks: str = ""
