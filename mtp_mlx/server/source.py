"""The engine's streams on an event loop: several texts of one request, without a thread that waits."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from mtp_mlx.engine import Engine, Event, Piece, Request
from mtp_mlx.errors import BusyError
from mtp_mlx.server.refusal import too_busy


class Source:
    """What comes of some requests. Made and read on an event loop; has to be closed."""

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        """Raises RefusedError where the queue has no room for all of them."""
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._streams = {}
        try:
            for number, request in enumerate(requests):
                self._streams[number] = engine.stream(request)
                self._streams[number].watch(self._tell)
        except BusyError as error:
            self.close()
            raise too_busy(error) from None

    @property
    def ended(self) -> bool:
        return not self._streams

    async def next(self, seconds: float) -> list[tuple[int, Event]]:
        """What has come, each event with the number of its request; nothing if none comes within so many seconds.

        Raises what the engine reports of any of them.
        """
        self._changed.clear()
        events = self._drain()
        if not events and not self.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
            events = self._drain()
        return events

    def close(self, number: int | None = None) -> None:
        """Nobody wants more of one, or of all of them."""
        for closed in [*self._streams] if number is None else [number]:
            if closed in self._streams:
                self._streams.pop(closed).close()

    def _drain(self) -> list[tuple[int, Event]]:
        events: list[tuple[int, Event]] = []
        for number, stream in [*self._streams.items()]:
            while (event := stream.get(0)) is not None:
                events.append((number, event))
                if isinstance(event, Piece) and event.finish_reason:
                    del self._streams[number]
                    break
        return events

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._changed.set)
