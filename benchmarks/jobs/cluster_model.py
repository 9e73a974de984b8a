"""A discrete-event simulation of the main job on a cluster: nodes, workers, shards, the object storage and the driver.

Each shard in progress is a process that yields the time at which it goes on. It does what
`pipeline.run.shard_worker.ShardWorker.make_shard` does: requests for images a few ahead, decoding on the worker's
threads, one batch at a time on the device, encoding, the requests of the commit, and the driver's part. Servers are
first come, first served; they hold no process, so a process of a preempted node simply ends.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.run.resources import GPU_SHARDS

__all__ = ["Cluster", "Cost", "Outcome", "Storage", "floor", "simulate"]

_READ_AHEAD = 16  # rows, as `pipeline.images.reading.read.read_images`
_PROBES = 3  # GET or HEAD requests of a shard besides images: its record twice, the store's attributes


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        decode_s: seconds of a core.
        device_s: seconds of the device: backbone and upsampling.
        encode_s: seconds of a core.
        rest_s: seconds in the thread of the shard that no stage counts, while it holds neither device nor core.
        read_bytes: encoded bytes of the image.
        written_bytes: stored bytes of its features.
        shard_rows: images of a shard.
        objects: objects of a shard, besides intent and record.
        batch: images of a batch on the device.
    """

    decode_s: float
    device_s: float
    encode_s: float
    rest_s: float
    read_bytes: float
    written_bytes: float
    shard_rows: int
    objects: int = 1
    batch: int = 32


@dataclass(frozen=True)
class Storage:
    """An object storage, or with the defaults a local disk without limits.

    Attributes:
        latency_s: of each request, until its first byte.
        gets_per_s: limit of GET and HEAD requests on the store's prefix, and on that of the images.
        puts_per_s: limit of PUT and DELETE requests on the store's prefix.
        request_bytes_per_s: of each request, which has one connection.
        images_per_get: neighbouring images of a tar in one range request.
    """

    latency_s: float = 0.0
    gets_per_s: float = float("inf")
    puts_per_s: float = float("inf")
    request_bytes_per_s: float = float("inf")
    images_per_get: int = 8


@dataclass(frozen=True)
class Cluster:
    """Machines.

    Attributes:
        workers: number of workers.
        cores: of each worker; with ``shared_cores``, of all workers together.
        per_node: workers of a node, which are preempted together.
        shards_at_once: shards in progress of each worker.
        bytes_per_s: share of the network of each worker, in each direction.
        driver_s: seconds of the driver's only thread for each shard.
        on_cores: whether the device is the cores themselves.
        shared_cores: whether all workers share one machine.
        preemptions_per_hour: of each node.
        replaced_s: from a preemption until the new node's workers are ready.
    """

    workers: int
    cores: int
    per_node: int = 1
    shards_at_once: int = GPU_SHARDS
    bytes_per_s: float = float("inf")
    driver_s: float = 0.0
    on_cores: bool = False
    shared_cores: bool = False
    preemptions_per_hour: float = 0.0
    replaced_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation.

    Attributes:
        images: that were made.
        seconds: until the last shard was done.
        steady_images_per_s: rate between a quarter and three quarters of the shards.
        busy: share of the time in which each kind of server was busy.
        lost_shards: shards in progress on nodes that were preempted.
    """

    images: int
    seconds: float
    steady_images_per_s: float
    busy: dict[str, float]
    lost_shards: int

    @property
    def bottleneck(self) -> str:
        """The busiest kind of server; latency, if none is busy most of the time."""
        name = max(self.busy, key=lambda kind: self.busy[kind])
        return name if self.busy[name] >= 0.85 else "latency"


class _Server:
    """``units`` equal units that serve in the order of arrival."""

    def __init__(self, units: int) -> None:
        self._free = [0.0] * units
        self.busy_s = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When a service that is asked for now ends."""
        end = max(now, self._free[0]) + seconds
        heapq.heapreplace(self._free, end)
        self.busy_s += seconds
        return end


@dataclass
class _Worker:
    node: int
    cores: _Server
    device: _Server
    incoming: _Server
    outgoing: _Server


@dataclass
class _Run:
    """State of a simulation."""

    cost: Cost
    storage: Storage
    cluster: Cluster
    waiting: deque[int]  # images of each shard that nobody has
    now: float = 0.0
    events: list[tuple[float, int, Iterator[float]]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=itertools.count)
    ends: list[tuple[float, int]] = field(default_factory=list)  # when shards were done, and their images
    lost: int = 0

    def __post_init__(self) -> None:
        self.gets, self.puts, self.image_gets, self.driver = (_Server(1) for _ in range(4))
        self.machine = _Server(self.cluster.cores) if self.cluster.shared_cores else None
        self.epochs = [0] * -(-self.cluster.workers // self.cluster.per_node)
        self.all: list[_Worker] = []

    def start(self, process: Iterator[float]) -> None:
        heapq.heappush(self.events, (self.now, next(self.order), process))

    def start_node(self, node: int) -> None:
        first = node * self.cluster.per_node
        for _ in range(first, min(first + self.cluster.per_node, self.cluster.workers)):
            cores = self.machine or _Server(self.cluster.cores)
            device = cores if self.cluster.on_cores else _Server(1)
            worker = _Worker(node, cores, device, _Server(1), _Server(1))
            self.all.append(worker)
            for _ in range(self.cluster.shards_at_once):
                self.start(self.slot(worker))

    def slot(self, worker: _Worker) -> Iterator[float]:
        """One shard after the other, until none is left or the node is lost."""
        epoch = self.epochs[worker.node]
        while self.waiting:
            images = self.waiting.popleft()
            for until in self.shard(worker, images):
                yield until
                if self.epochs[worker.node] != epoch:
                    self.waiting.append(images)
                    self.lost += 1
                    return
            self.ends.append((self.now, images))

    def shard(self, worker: _Worker, images: int) -> Iterator[float]:
        """A shard; yields the times at which it goes on."""
        cost = self.cost
        yield from self.requests(self.gets, self.storage.gets_per_s, 1)
        encoded = 0.0
        for batch in self.batches(worker, images):
            if isinstance(batch, float):
                yield batch
                continue
            for start in range(0, batch, cost.batch):
                yield worker.device.serve(self.now, min(cost.batch, batch - start) * cost.device_s)
            for _ in range(batch):
                encoded = max(encoded, worker.cores.serve(self.now, cost.encode_s))
        if encoded > self.now:
            yield encoded
        yield self.now + images * cost.rest_s
        yield from self.requests(self.gets, self.storage.gets_per_s, _PROBES - 1)
        yield from self.requests(self.puts, self.storage.puts_per_s, 1)  # the intent
        for _ in range(cost.objects):
            yield from self.requests(self.puts, self.storage.puts_per_s, 1)
        yield self.transferred(worker.outgoing, images * cost.written_bytes)
        yield from self.requests(self.puts, self.storage.puts_per_s, 2)  # the record, and the end of the intent
        yield self.driver.serve(self.now, self.cluster.driver_s)

    def transferred(self, network: _Server, nbytes: float) -> float:
        """When the bytes of one request, which begin to come now, are all there."""
        alone = self.now + nbytes / self.storage.request_bytes_per_s
        return max(alone, network.serve(self.now, nbytes / self.cluster.bytes_per_s))

    def requests(self, limit: _Server, per_s: float, count: int) -> Iterator[float]:
        """Small requests, one after the other."""
        for _ in range(count):
            yield limit.serve(self.now, 1 / per_s) + self.storage.latency_s

    def batches(self, worker: _Worker, images: int) -> Iterator[float | int]:
        """As `pipeline.images.batches.BatchLoader`: times to wait for, and numbers of images that are decoded."""
        cost, each = self.cost, self.storage.images_per_get
        unread, pending = images, deque[float]()  # when each image is decoded
        requests: deque[tuple[float, int]] = deque()  # when each request ends, and its images
        read = asked = 0
        while True:
            while len(pending) < 2 * cost.batch and unread:
                while asked < images and asked - read < max(_READ_AHEAD, each):
                    count = min(each, images - asked)
                    begun = self.image_gets.serve(self.now, 1 / self.storage.gets_per_s) + self.storage.latency_s
                    requests.append((begun, count))
                    asked += count
                begun, count = requests.popleft()
                if begun > self.now:
                    yield begun
                yield self.transferred(worker.incoming, count * cost.read_bytes)
                read, unread = read + count, unread - count
                pending.extend(worker.cores.serve(self.now, cost.decode_s) for _ in range(count))
            if not pending:
                return
            batch = [pending.popleft() for _ in range(min(cost.batch, len(pending)))]
            if max(batch) > self.now:
                yield max(batch)
            yield len(batch)

    def preemptions(self, node: int, chance: random.Random) -> Iterator[float]:
        """Loses a node from time to time, and starts another."""
        while True:
            yield self.now + chance.expovariate(self.cluster.preemptions_per_hour / 3600)
            self.epochs[node] += 1
            yield self.now + self.cluster.replaced_s
            self.start_node(node)


def simulate(images: int, cost: Cost, storage: Storage, cluster: Cluster, seed: int = 0) -> Outcome:
    """Simulate a job from the moment its workers are ready until its last shard is done.

    Args:
        images: of the job.
        cost: of an image.
        storage: that images are read from and features written to.
        cluster: the machines.
        seed: of the preemptions.
    """
    shards = -(-images // cost.shard_rows)
    sizes = [cost.shard_rows] * (shards - 1) + [images - (shards - 1) * cost.shard_rows]
    run = _Run(cost, storage, cluster, deque(sizes))
    chance = random.Random(seed)
    for node in range(len(run.epochs)):
        run.start_node(node)
        if cluster.preemptions_per_hour:
            run.start(run.preemptions(node, chance))
    while len(run.ends) < shards:
        run.now, _, process = heapq.heappop(run.events)
        until = next(process, None)
        if until is not None:
            heapq.heappush(run.events, (until, next(run.order), process))
    return Outcome(images, run.now, _steady(run.ends), _busy(run), run.lost)


def _steady(ends: list[tuple[float, int]]) -> float:
    first, last = len(ends) // 4, max(len(ends) * 3 // 4, len(ends) // 4 + 1)
    middle = ends[first:last]
    begun = ends[first - 1][0] if first else 0.0
    return sum(images for _, images in middle) / (middle[-1][0] - begun)


def _busy(run: _Run) -> dict[str, float]:
    """Share of the time in which servers of each kind were busy."""
    seconds, workers = run.now, run.cluster.workers

    def mean(servers: list[_Server], units: int) -> float:
        return sum(server.busy_s for server in servers) / (units * seconds)

    cores = [run.machine] if run.machine else [worker.cores for worker in run.all]
    found = {
        "cores": mean(cores, run.cluster.cores * (1 if run.machine else workers)),
        "network in": mean([worker.incoming for worker in run.all], workers),
        "network out": mean([worker.outgoing for worker in run.all], workers),
        "GET rate": max(mean([run.image_gets], 1), mean([run.gets], 1)),
        "PUT rate": mean([run.puts], 1),
        "driver": mean([run.driver], 1),
    }
    if not run.cluster.on_cores:
        found["GPU"] = mean([worker.device for worker in run.all], workers)
    return {name: round(share, 4) for name, share in found.items()}


def floor(cost: Cost, storage: Storage, cluster: Cluster) -> tuple[float, str]:
    """Images per second that no schedule can exceed, and the server that sets this limit, in closed form."""
    cores = cluster.cores * (1 if cluster.shared_cores else cluster.workers)
    rows, puts = cost.shard_rows, 3 + cost.objects
    on_cores = cost.decode_s + cost.encode_s + (cost.device_s if cluster.on_cores else 0)
    seconds = {
        "cores": on_cores / cores,
        "GPU": 0.0 if cluster.on_cores else cost.device_s / cluster.workers,
        "network in": cost.read_bytes / cluster.bytes_per_s / cluster.workers,
        "network out": cost.written_bytes / cluster.bytes_per_s / cluster.workers,
        "GET rate": max(1 / storage.images_per_get, _PROBES / rows) / storage.gets_per_s,
        "PUT rate": puts / rows / storage.puts_per_s,
        "driver": cluster.driver_s / rows,
    }
    name = max(seconds, key=lambda kind: seconds[kind])
    return 1 / seconds[name], name
