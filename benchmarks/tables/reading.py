"""Tables of reading for training."""

from benchmarks import rows
from benchmarks.tables import formats

_PLACES = {"local": "a local folder", "s3": "S3 on the same machine, with {ms:.0f} ms of latency"}


def reading() -> str:
    """Random images and epochs per second, of the latest row."""
    row = rows.read("reading")[-1]
    parts = [
        f"{row['images']} photographs, {row['height']}×{row['width']}, k = {row['k']}, int8, on "
        f"{formats.machine(row)}: "
        "images/s, medians of interleaved runs (`python -m benchmarks.store.reading`). Other formats hold float16. "
        "Raw: the same bytes, not decoded."
    ]
    for place, title in _PLACES.items():
        measured = row["places"][place]
        parts.append(f"From {title.format(ms=1000 * row['latency_s'])}:\n\n" + _random(measured["random"]))
        parts.append(_epochs(measured["epoch"], measured["epoch_peak_bytes"]))
    return "\n\n".join(parts)


def memory() -> str:
    """Memory of long epochs, one line, of the latest row."""
    row = rows.read("memory")[-1]
    peaks = [peak / 1e6 for peak in row["peak_bytes"]]
    return (
        f"{len(peaks)} epochs of {row['rows']:,} rows ({row['height']}×{row['width']}, k = {row['k']}) in batches of "
        f"{row['batch']} with a buffer of {row['buffer_bytes'] / 2**20:.0f} MB, {row['float32_bytes'] / 1e9:,.0f} GB "
        f"of float32 in all: the process had at most {max(peaks):,.0f} MB, {peaks[0]:,.0f} MB in the first epoch and "
        f"{peaks[-1]:,.0f} MB in the last (`python -m benchmarks.densefeat.memory`)."
    )


def opening() -> str:
    """Time and memory to open a store of ImageNet's size, one line, of the latest row."""
    row = rows.read("opening")[-1]
    cases = ", ".join(
        f"{case}: {found['cpu_s']:.2f} s, {found['bytes'] / 1e6:,.0f} MB" for case, found in row["cases"].items()
    )
    return (
        f"A finished store of {row['rows']:,} rows, opened in a new process: CPU time and memory until there is the … "
        f"{cases}. Its index is a file of {row['index_bytes'] / 1e6:.0f} MB "
        f"({formats.machine(row)}; `python -m benchmarks.densefeat.opening`)."
    )


def _random(random: dict[str, dict[str, float]]) -> str:
    table = [f"| random images, in flight | {' | '.join(random)} |", "|---|" + "---|" * len(random)]
    table += [
        f"| {side} | " + " | ".join(f"{of_threads[side]:.3g}" for of_threads in random.values()) + " |"
        for side in next(iter(random.values()))
    ]
    return "\n".join(table)


def _epochs(epoch: dict[str, float], peak_bytes: float) -> str:
    raw = epoch["raw, 8 MB"]
    table = ["| shuffled epoch | images/s | of raw |", "|---|---|---|"]
    table += [f"| {side} | {rate:.3g} | {rate / raw:.0%} |" for side, rate in epoch.items()]
    return "\n".join(table) + f"\n\nPeak memory of an epoch with a buffer of 16 MB: {peak_bytes / 1e6:.0f} MB."
