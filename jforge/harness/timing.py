"""One way to time a call, for both frameworks.

On a GPU: the sum of the durations of the kernels that a call launches, read by CUPTI, which sees JAX's and torch's
kernels alike. Host time and launch gaps are not in it; the number of kernels is reported beside it, since each costs
about 2 us of gap in a captured graph. On a CPU: wall time of a call that blocks on its result.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median: float
    p10: float
    p90: float
    samples: int
    kernels: int


@dataclass(frozen=True)
class Call:
    """An implementation: `run(i)` computes on input set i and returns what is judged, of its own framework.

    want, moved, sets: of a call on inputs of its own, what it must give, the bytes that its rate counts, and how many
    sets there are. refused: why it is not run.
    """

    name: str
    run: Callable[[int], Any]
    synchronise: Callable[[], object]
    want: Any = None
    moved: int | None = None
    sets: int | None = None
    refused: str | None = None


def jax_call(name: str, function: Callable, inputs: Sequence[list], carry: int | None = None) -> Call:
    """`function` compiled. carry: the argument that is donated and replaced by the second result, a state."""
    compiled, last = jax.jit(function, donate_argnums=() if carry is None else carry), []

    def run(i: int):
        result = compiled(*inputs[i])
        if carry is None:
            last[:] = [result]
        else:  # what is waited for must outlive the next call, to which the state is given
            inputs[i][carry], last[:] = result[1], result[:1]
        return result

    return Call(name, run, lambda: jax.block_until_ready(last))


def _summary(samples: Sequence[float], kernels: int) -> Timing:
    tenths = statistics.quantiles(samples, n=10) if len(samples) > 1 else [samples[0]] * 9
    return Timing(statistics.median(samples), tenths[0], tenths[-1], len(samples), kernels)


def time_cpu(call: Callable[[], object], *, samples: int = 20, warmup: int = 3) -> Timing:
    """Wall time of `call`, which must return only when its result is there."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return _summary(times, 0)


def time_gpu(
    calls: Sequence[Callable[[], object]], synchronise: Callable[[], None], *, samples: int = 50, warmup: int = 3
) -> Timing:
    """Device time of a call. `calls` are the same work on different buffers, taken in turn so that L2 stays cold.

    Raises RuntimeError when the calls launch no kernel or not the same number each.
    """
    from pallas_kernels.compat import cupti

    reader = cupti()
    for call in calls:
        for _ in range(warmup):
            call()
    synchronise()
    reader._cupti_init()
    try:
        for i in range(samples):
            calls[i % len(calls)]()
        synchronise()
    finally:
        kernels = reader._cupti_get_timings(True)
    if not kernels or len(kernels) % samples:
        raise RuntimeError(f"{len(kernels)} kernels in {samples} calls: the calls do not launch the same work each")
    each = len(kernels) // samples
    milliseconds = [sum(ms for _, ms in kernels[i * each : (i + 1) * each]) for i in range(samples)]
    return _summary([1e3 * ms for ms in milliseconds], each)
