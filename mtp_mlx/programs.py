"""Steps of a round, traced by mx.compile once and replayed from then on.

A step is a function of a sequence's cache and of arrays. It is traced anew for other shapes (a grown buffer, a block
of another length) and for other fixed arguments (a number of drafts, a sampler); a replay costs no Python.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache as once
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from mtp_mlx.cache import Cache
    from mtp_mlx.types import Drafter, Target

# (target or drafter, cache, fixed, *arrays) -> a tree of arrays. What the step writes it writes into the cache.
Step = Callable[..., Any]
KEPT = 64  # traced steps; a caller with ever new settings must not fill the memory with graphs


class Programs:
    """Traced steps, shared by all sequences of a pair.

    A trace holds the weights that a model had when it was made: whoever changes them afterwards needs a new pair.
    """

    def __init__(self) -> None:
        self._traced: OrderedDict[Hashable, _Traced] = OrderedDict()

    def run(self, step: Step, model: "Target | Drafter", cache: "Cache", fixed: Hashable, *arrays: Any) -> Any:
        """What `step` returns. The cache holds its new arrays then, or the old ones if it failed."""
        key = (step, id(model), fixed)  # the trace keeps the model, hence its id
        traced = self._traced.pop(key, None) or _Traced(step, model, fixed)
        self._traced[key] = traced  # the latest one last
        if len(self._traced) > KEPT:
            self._traced.popitem(last=False)
        return traced(cache, arrays)


class _Traced:
    def __init__(self, step: Step, model: "Target | Drafter", fixed: Hashable):
        def body(held: Any, arrays: Any) -> Any:
            # Runs while tracing only, on the cache of the call that brought it about.
            assert self._cache is not None
            self._cache.bind(held)
            result = step(model, self._cache, fixed, *arrays)
            return self._cache.arrays(), result

        self._cache: Cache | None = None
        self._replay = mx.compile(body)

    def __call__(self, cache: "Cache", arrays: Any) -> Any:
        held = cache.arrays()
        self._cache = cache
        try:
            written, result = self._replay(held, arrays)
        except BaseException:
            cache.bind(held)  # in the middle of a trace it holds placeholders
            raise
        finally:
            self._cache = None
        cache.bind(written)
        return result


@once
def compiles() -> bool:
    """Whether mx.compile does anything here: on a CPU it needs a C++ compiler, and it can be turned off."""
    traces = 0

    def probe(x: mx.array) -> mx.array:
        nonlocal traces
        traces += 1
        return x + 1

    compiled = mx.compile(probe)
    for _ in range(2):
        compiled(mx.zeros(1))
    return traces == 1
