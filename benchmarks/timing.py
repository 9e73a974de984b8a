"""Medians of several sides run in turn, and the memory each takes; on a CPU or a GPU."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Function = Callable[[], Any]

# Threads of OpenMP spin for some 20 ms after the last call of torch, and take a core from whoever comes next.
_SETTLE_MS = 25


def median_ms(
    sides: Mapping[str, Function], device: str, seconds_each: float = 3.0, most: int = 30
) -> dict[str, float]:
    """Median milliseconds of each, run in turn so that a slow moment of the machine hits all of them.

    What is quick runs untimed for a moment first: it is then judged on its own, and warm.
    Each runs as often as fits into ``seconds_each``, at least three times and at most ``most`` times; what takes more
    than five seconds, once.
    """
    for function in sides.values():
        function()  # compiles, fills caches
    once = {name: _ms(function, device) for name, function in sides.items()}
    runs = {name: 1 if ms > 5000 else min(most, max(3, int(1000 * seconds_each / ms))) for name, ms in once.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(max(runs.values())):
        for name, function in sides.items():
            # Sides with fewer runs are spread over the turns.
            if turn * runs[name] // max(runs.values()) != (turn - 1) * runs[name] // max(runs.values()):
                _settle(function, once[name])
                times[name].append(_ms(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


def _settle(function: Function, ms: float) -> None:
    for _ in range(int(_SETTLE_MS / ms)):
        function()


def _ms(function: Function, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return 1000 * (time.perf_counter() - start)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(function: Function, device: str) -> int:
    """How much memory a call takes at its peak beyond what was taken before, its result included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory of earlier calls is taken again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes of a field of Linux's /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
