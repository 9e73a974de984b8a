"""Tables of simulated scaling, and of scheduling compared with Ray Data's."""

from typing import Any

from benchmarks import rows
from benchmarks.tables import formats

_MEASURED_CORES = 16


def scale() -> str:
    """Simulated jobs on 1 to 1,000 GPUs."""
    row = [row for row in rows.read("scale") if row["kind"] == "simulated"][-1]
    runs = {(run["represent"], run["cores"], run["gpus"], run["dataset"]): run for run in row["runs"]}
    datasets = list(dict.fromkeys(run["dataset"] for run in row["runs"]))
    gpus = list(dict.fromkeys(run["gpus"] for run in row["runs"]))
    table = [
        f"| features | GPUs | images/s | limited by | hours (floor): {' | '.join(datasets)} "
        f"| node-hours: {datasets[-1]} |",
        "|---|---|---|---|" + "---|" * (len(datasets) + 1),
    ]
    for represent in dict.fromkeys(run["represent"] for run in row["runs"]):
        for count in gpus:
            of = [runs[represent, _MEASURED_CORES, count, dataset] for dataset in datasets]
            hours = " | ".join(f"{_hours(run['hours'])} ({_hours(run['floor_hours'])})" for run in of)
            table.append(
                f"| {represent} | {count:,} | {of[-1]['steady_images_per_s']:,.0f} | {of[-1]['bottleneck']} "
                f"| {hours} | {of[-1]['node_hours']:,.0f} |"
            )
    storage, gpu = row["storage"], row["measured_gpu"]
    return (
        "Simulated, not measured (`python -m benchmarks.jobs.scale`): a discrete-event simulation with the measured "
        f"times of one {gpu['device'].split(' 80GB')[0]} with {gpu['cores']} cores: EfficientNet-Lite0, k = 64, 224 "
        "px, int8. "
        f"Images in tars and the store in object storage: {1000 * storage['latency_s']:.0f} ms per request, "
        f"{storage['gets_per_s']:,.0f} GET and {storage['puts_per_s']:,.0f} PUT per second, "
        f"{row['bytes_per_s'] * 8 / 1e9:.1f} Gb/s per GPU, {storage['request_bytes_per_s'] / 1e6:.0f} MB/s per "
        f"request; nodes of up to 8 GPUs, each lost "
        f"{row['preemptions_per_hour']:g} times per hour; {row['driver_ms_per_shard']:.1f} ms of the driver per shard. "
        "Floor: what the busiest server alone would take, in closed form.\n\n"
    ) + "\n".join(table)


def scale_limits() -> str:
    """What changes the simulated rates, and how well the simulation predicts measured ones."""
    row = [row for row in rows.read("scale") if row["kind"] == "simulated"][-1]
    measured = [row for row in rows.read("scale") if row["kind"] == "measured"][-1]
    cores = ", ".join(
        f"{run['cores']}: {run['steady_images_per_s']:.0f}"
        for run in row["runs"]
        if (run["represent"], run["gpus"], run["dataset"]) == ("dense", 1, "ImageNet-21k")
    )
    checked = "; ".join(
        f"{one['workers']} worker{'s' * (one['workers'] > 1)}: {one['measured']:.1f} measured, {one['predicted']:.1f} "
        "simulated"
        for one in row["validation"]
    )
    rates = {(one["latency_s"], one["shards_at_once"]): one["images_per_s"] for one in row["what_if"]}
    at_once = list(dict.fromkeys(shards for _, shards in rates))
    table = [
        f"| per request | {' | '.join(f'{shards} shards' for shards in at_once)} |",
        "|---" * (1 + len(at_once)) + "|",
    ]
    for latency in dict.fromkeys(latency for latency, _ in rates):
        cells = " | ".join(f"{rates[latency, shards]:.0f}" for shards in at_once)
        table.append(f"| {1000 * latency:.0f} ms | {cells} |")
    return (
        "One GPU, dense, simulated images/s, by the time of a request and the shards that a worker has in progress; "
        f"the code has {row['shards_at_once']}, if memory allows. By cores, with as many and "
        f"{1000 * row['storage']['latency_s']:.0f} ms: {cores}.\n\n"
        + "\n".join(table)
        + f"\n\nCheck of the simulation: {measured['runs']['1 workers']['images']} photographs from a local disk, by "
        f"workers of Ray that share {formats.machine(measured)}, the fastest of {measured['turns']} runs; the times "
        f"are those of the job with one worker. Images/s: {checked} (`python -m benchmarks.jobs.scale_measured`)."
    )


def driver() -> str:
    """Time and memory of the driver, by the number of shards."""
    latest = {(row["shards"], row["shard_rows"]): row for row in rows.read("driver")}
    table = [
        "| shards | images | the driver's CPU per shard, of it the queue | sent per shard "
        "| memory: an image listed / a shard done | to finish the store | most memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for (shards, shard_rows), row in sorted(latest.items()):
        table.append(
            f"| {shards:,} | {shards * shard_rows:,} | {row['driver_us_per_shard']:.0f} µs, "
            f"{row['queue_us_per_shard']:.0f} µs | {row['sent_bytes_per_shard'] / 1e3:.1f} kB "
            f"| {row['references_bytes_per_image']:.0f} B / {row['records_bytes_per_shard'] / 1e3:.1f} kB "
            f"| {row['finish_s']:.0f} s | {row['peak_bytes'] / 1e9:.1f} GB |"
        )
    row = next(iter(latest.values()))
    return (
        f"The driver's own code, for {row['workers']:,} workers with {row['shards_at_once']} shards each, without "
        f"Ray's calls, storage, and the work itself, on {formats.machine(row)} "
        "(`python -m benchmarks.jobs.driver`).\n\n"
    ) + "\n".join(table)


def overhead() -> str:
    """The job compared with a bare loop over the same stages."""
    row = rows.read("overhead")[-1]
    rates = row["images_per_s"]
    bare = rates["bare loop"]
    table = ["| | images/s | share of the bare loop |", "|---|---|---|"]
    table += [f"| {side} | {rate:.1f} | {100 * rate / bare:.0f}% |" for side, rate in rates.items()]
    return (
        f"`{row['backbone']}`, k = {row['k']}, {row['size']} px, {row['images']:,} photographs, without start and PCA, "
        f"on {formats.machine(row)}, medians of {row['turns']} runs (`python -m benchmarks.jobs.overhead`). The bare "
        "loop is a process per core that reads, decodes, computes, quantizes and encodes one batch after the other, "
        "and keeps nothing.\n\n"
    ) + "\n".join(table)


def decode_elsewhere() -> str:
    """Rate of a worker with one core, alone and with a node that decodes for it."""
    row = rows.read("decode_elsewhere")[-1]
    alone, helped = row["runs"]["alone"]["images_per_s"], row["runs"]["with a node"]["images_per_s"]
    spread = "; ".join(f"{name}: {', '.join(f'{rate:.1f}' for rate in rates)}" for name, rates in row["spread"].items())
    ratios = [b / a for a, b in zip(row["spread"]["alone"], row["spread"]["with a node"], strict=True)]
    return (
        "Decoding on a node without a GPU: a worker with one core and a stand-in for a GPU of "
        f"{row['device_images_per_s']:,} images/s reads and decodes photographs for 224 px, by itself and with a node "
        f"of one core. Images/s, in turns: {spread}. The fastest with it is {helped / alone:.2f} times the fastest "
        f"without; by turns, the ratio is {min(ratios):.2f} to {max(ratios):.2f}, with other work on the machine (a "
        f"load of {row['load_before']:g} before). Nothing is encoded. Rates until no shard of {row['shards']} is left "
        f"to begin, on {formats.machine(row)}, of which each node has one "
        "(`python -m benchmarks.jobs.decode_elsewhere`)."
    )


def ray_data() -> str:
    """The same shards with densefeat's scheduling and with Ray Data's."""
    row = rows.read("ray_data")[-1]
    tolerant = ", ".join(f"`{name}={value}`" for name, value in row["tolerant"].items())
    cases = {
        "raises": "a shard always raises",
        "kills": "a shard always kills its process",
        "hangs": "a shard always hangs",
        "restart": "the driver is killed half-way, and started again",
    }
    table = [
        "| | scheduling | how it ends | time | shards done | good shards done again |",
        "|---|---|---|---|---|---|",
    ]
    for case, title in cases.items():
        latest = [one for one in rows.read("ray_data") if all(case in found for found in one["systems"].values())][-1]
        for system, found in latest["systems"].items():
            one: dict[str, Any] = found[case]
            end = one["end"].replace("killed by this benchmark", f"still runs after {row['limit_s']} s")
            table.append(
                f"| {title} | {system} | {end} | {formats.seconds(one['seconds'])} "
                f"| {one['done']} of {row['shards']} | {one['redone']} |"
            )
    return (
        f"{row['shards']} shards of {row['shard_s']:g} s ({row['shard_s_of_restart']:g} s in the last case) "
        f"on two workers, Ray {row['versions']['ray']}, on "
        f"{formats.machine(row)} (`python -m benchmarks.jobs.ray_data`). Tolerant: {tolerant}, "
        f"`max_task_retries=2`. densefeat: 3 attempts, and workers are replaced after {row['stall_timeout_s']:g} s "
        "without progress; its exit code 1 says that shards were given up, which are named.\n\n"
    ) + "\n".join(table)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
