"""Median times of several functions in interleaved runs, and the memory of each; on a CPU or a GPU."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Function = Callable[[], Any]

# OpenMP threads spin for about 20 ms after torch's last call, and take a core from the next function.
_SETTLE_MS = 25


def median_ms(
    sides: Mapping[str, Function], device: str, seconds_each: float = 3.0, most: int = 30, *, one_thread: bool = False
) -> dict[str, float]:
    """Median milliseconds of each function, with interleaved runs, so that a slow phase of the machine affects all.

    Fast functions first run untimed for a moment, so that they are warm and not slowed by the one before. Each runs as
    often as fits into ``seconds_each``, at least three and at most ``most`` times; functions that take more than five
    seconds run once. With ``one_thread``, times on a CPU are the process's CPU time, which other processes do not add
    to: on an idle machine, functions with one thread take as long.
    """
    clock = time.process_time if one_thread and device == "cpu" else time.perf_counter
    for function in sides.values():
        function()  # compile, fill caches
    once = {name: _ms(function, device, clock) for name, function in sides.items()}
    runs = {name: 1 if ms > 5000 else min(most, max(3, int(1000 * seconds_each / ms))) for name, ms in once.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(max(runs.values())):
        for name, function in sides.items():
            # Spread functions with fewer runs over the turns.
            if turn * runs[name] // max(runs.values()) != (turn - 1) * runs[name] // max(runs.values()):
                _settle(function, once[name])
                times[name].append(_ms(function, device, clock))
    return {name: statistics.median(values) for name, values in times.items()}


def _settle(function: Function, ms: float) -> None:
    for _ in range(int(_SETTLE_MS / ms)):
        function()


def _ms(function: Function, device: str, clock: Callable[[], float]) -> float:
    _wait(device)
    start = clock()
    function()
    _wait(device)
    return 1000 * (clock() - start)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(function: Function, device: str) -> int:
    """Peak memory of a call beyond the memory in use before it, including its result."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise memory freed by earlier calls would be reused unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Value in bytes of a field of Linux's /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
