"""The counters of `/metrics`, in a registry of their own. Those of speculation are named as vLLM's."""

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mtp_mlx.engine import Engine
from mtp_mlx.server.reply import Reply

_FIRST = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # seconds
_EACH = (0.001, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1)  # seconds


class Metrics:
    """What a server has done since it was started."""

    def __init__(self, engine: Engine):
        self.routes = frozenset[str]()  # paths that are counted each for itself
        self._registry = registry = CollectorRegistry()

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"mtp_mlx_{name}", words, labels, registry=registry)

        self._requests = counter("requests", "Requests", ("route", "outcome"))
        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._cached = counter("prompt_tokens_cached", "Tokens of prompts that were not read again")
        self._generated = counter("generation_tokens", "Tokens written")
        self._drafts = counter("spec_decode_num_drafts", "Rounds with drafts")
        self._drafted = counter("spec_decode_num_draft_tokens", "Tokens drafted")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafts that were kept")
        self._positions = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafter's own drafts that were kept", ("position",)
        )
        self._first = Histogram(
            "mtp_mlx_time_to_first_token_seconds", "From request to first token", buckets=_FIRST, registry=registry
        )
        self._each = Histogram(
            "mtp_mlx_time_per_output_token_seconds", "Of a text, in the mean", buckets=_EACH, registry=registry
        )
        _gauges(registry, engine)

    def count(self, path: str, outcome: str) -> None:
        """A request is over. Paths that are no route are counted as one."""
        self._requests.labels(path if path in self.routes else "other", outcome).inc()

    def add(self, reply: Reply, first: float | None) -> None:
        """A text is over, whole or not; `first` is how long its first token took."""
        stats = reply.stats
        self._prompt.inc(len(reply.prompt))
        self._cached.inc(reply.cached)
        self._generated.inc(len(reply.ids))
        self._drafts.inc(stats.reached_per_position[0] if stats.reached_per_position else 0)
        self._drafted.inc(stats.drafted)
        self._accepted.inc(stats.accepted)
        for position, kept in enumerate(stats.accepted_at_position):
            self._positions.labels(str(position)).inc(kept)
        if first is not None:
            self._first.observe(first)
        if stats.generation_tokens:
            self._each.observe(stats.generation_seconds / stats.generation_tokens)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


def _gauges(registry: CollectorRegistry, engine: Engine) -> None:
    def gauge(name: str, words: str) -> Gauge:
        return Gauge(f"mtp_mlx_{name}", words, registry=registry)

    gauge("requests_live", "Texts that are read or written").set_function(lambda: engine.load.live)
    gauge("requests_waiting", "Texts that wait for their turn").set_function(lambda: engine.load.waiting)
    gauge("memory_active_bytes", "Held by MLX").set_function(mx.get_active_memory)
    gauge("memory_peak_bytes", "Most held by MLX").set_function(mx.get_peak_memory)
    gauge("prompt_cache_bytes", "Held of prompts").set_function(lambda: engine.usage.nbytes if engine.usage else 0)
    gauge("prompt_cache_hits", "Prompts that went on from the cache").set_function(
        lambda: engine.usage.hits if engine.usage else 0
    )
    gauge("prompt_cache_queries", "Prompts looked up in the cache").set_function(
        lambda: engine.usage.texts if engine.usage else 0
    )
