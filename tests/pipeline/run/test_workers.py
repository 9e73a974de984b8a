"""What a job may rely on, wherever its tasks run: in this process, or as actors of a Ray that is started here."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import torch

from densefeat.errors import DensefeatError, StorageUnavailable, WrongClock
from pipeline.errors import JobError
from pipeline.run.resources import Slot
from pipeline.run.workers import InlineWorkers, TaskFailed, Workers
from tests.helpers.scripted_workers import SPEC, ScriptedWorker, make, making_badly

Open = Callable[..., AbstractContextManager[Any]]
WAIT_S = 0.05  # before a task that failed is tried again
# Ray's own files and sockets are left to the end of the process.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    from pipeline.run.ray.cluster import connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)  # for tests.helpers
        with connected():
            yield


def on_ray(count: int = 1, **options: Any) -> Any:
    from pipeline.run.ray.workers import RayWorkers

    settings: dict[str, Any] = {"make": make, "first_wait_s": WAIT_S, **options}
    return RayWorkers(SPEC.on("cpu", 1), [Slot(1, 0)] * count, **settings)


def inline(**options: Any) -> Any:
    return InlineWorkers(SPEC, **{"make": make, "first_wait_s": WAIT_S, **options})


@pytest.fixture(params=["inline", "ray"])
def opened(request: pytest.FixtureRequest) -> Open:
    if request.param == "inline":
        return inline
    request.getfixturevalue("ray_here")
    return on_ray


def results(workers: Workers, method: Callable[..., Any], *tasks: tuple[Any, ...]) -> dict[int, Any]:
    """Every task ends once."""
    found: dict[int, Any] = {}
    for task, result in workers.map(method, tasks):
        assert task not in found
        found[task] = result
    assert sorted(found) == list(range(len(tasks)))
    return found


# --- Both kinds ---


def test_results_progress_and_shared_values(opened: Open) -> None:
    images = 0

    def on_progress(more: int) -> None:
        nonlocal images
        assert more >= 0
        images += more

    with opened() as workers:
        for _ in range(2):  # what an earlier map did is not counted again
            shared = workers.share(21)
            images, found = 0, {}
            for task, result in workers.map(ScriptedWorker.double, [(shared,), (1,), (2,), (3,)], on_progress):
                found[task] = result
            assert found == {0: 42, 1: 2, 2: 4, 3: 6}
            assert images <= 4
        assert results(workers, ScriptedWorker.double) == {}


def test_a_storage_that_comes_back(opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(attempts=3) as workers:
        assert results(workers, ScriptedWorker.storage_is_back_after, (tmp_path / "log", 2)) == {0: 3}
    assert caplog.text.count("the storage did not answer") == 2
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("error", "text", "reason"),
    [
        (StorageUnavailable, "s3://x did not answer: 503", "s3://x did not answer: 503"),
        (ValueError, "two\nlines", "ValueError: two lines"),
        (MemoryError, "", "MemoryError"),
    ],
)
def test_a_task_that_always_fails_is_given_up_and_the_others_are_not(
    opened: Open, caplog: pytest.LogCaptureFixture, error: type[Exception], text: str, reason: str
) -> None:
    with opened(attempts=2) as workers:
        found = results(workers, ScriptedWorker.raises, *((error, text, number) for number in range(6)))
    assert found == {0: 0, 2: 2, 4: 4, **dict.fromkeys((1, 3, 5), TaskFailed(2, reason))}
    # Nobody foresaw a ValueError: where it comes from is said, once.
    assert caplog.text.count("Traceback (most recent call last)") <= (0 if error is StorageUnavailable else 2)
    assert ("in raises" in caplog.text) == (error is not StorageUnavailable)
    assert caplog.text.count("in raises") <= 1


def test_a_job_error_ends_the_job_at_once(opened: Open) -> None:
    with opened() as workers, pytest.raises(JobError, match="this cannot be done"):
        results(workers, ScriptedWorker.job_error, (1,), (2,), (3,))


def test_where_all_clocks_are_wrong_the_job_ends(opened: Open) -> None:
    with opened() as workers, pytest.raises(DensefeatError, match="the clock of here says") as raised:
        results(workers, ScriptedWorker.raises, (WrongClock, "s3://x: the clock of here says 1970: set it", 1))
    assert isinstance(raised.value, WrongClock) or "the clocks of all nodes are wrong" in str(raised.value)


# --- In this process ---


def test_inline_torch_has_one_thread_in_operations_and_gives_them_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with inline() as workers:
            assert results(workers, ScriptedWorker.where) == {}
            assert results(workers, ScriptedWorker.where, ())[0] == (os.getpid(), SPEC.threads, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_inline_what_runs_is_stopped_by_an_interrupt() -> None:
    def interrupt() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    # Python takes no notice of interrupts where it was started with them ignored, as background jobs of a shell are.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt), inline() as workers:
            results(workers, ScriptedWorker.slow, *((60, number) for number in range(9)))
    finally:
        signal.signal(signal.SIGINT, before)
    running = [thread for thread in threading.enumerate() if thread.name.startswith("task")]
    for thread in running:
        thread.join(5)
        assert not thread.is_alive()


# --- On Ray ---


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if "ray::WorkerActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def cut_connections(process: psutil.Process) -> int:
    """Shut this process's connections to another one down, as a network does that fails; how many there were."""
    theirs = {connection.laddr for connection in process.net_connections("tcp") if connection.status == "LISTEN"}
    ports = {address.port for address in theirs}
    cut = 0
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port in ports and connection.fd >= 0:
            with socket.socket(fileno=os.dup(connection.fd)) as own:
                own.shutdown(socket.SHUT_RDWR)
            cut += 1
    return cut


@pytest.mark.usefixtures("ray_here")
def test_tables_come_and_go_as_they_are() -> None:
    """Slices, several chunks, nested and empty columns, none at all; neither side takes them apart in Python."""
    import ray.cloudpickle

    table = pa.table({"a": [1, None, 3], "b": ["x", None, "ÿ"], "c": [[1.0], None, []], "d": pa.nulls(3)})
    tables = [table, table.slice(1, 1), pa.concat_tables([table, table.slice(2)]), table.slice(0, 0), pa.table({})]
    with on_ray() as workers:
        found = results(workers, ScriptedWorker.same, *((one,) for one in tables))
    assert [found[i].equals(one, check_metadata=True) for i, one in enumerate(tables)] == [True] * len(tables)
    sent = ray.cloudpickle.dumps(table)
    assert b"pipeline.run.ray.tables" in sent


@pytest.mark.usefixtures("ray_here")
def test_a_worker_counts_its_own_threads() -> None:
    with on_ray() as workers:
        process, threads, torch_threads = results(workers, ScriptedWorker.where, ())[0]
    assert process != os.getpid()
    assert (threads, torch_threads) == (1, 1)  # it was given one CPU


@pytest.mark.usefixtures("ray_here")
def test_a_task_that_kills_its_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is tried again alone, and at last given up; those that were with it are made."""
    poison, passing = tmp_path / "poison", tmp_path / "passing"
    with on_ray(attempts=2) as workers:
        found = results(
            workers, ScriptedWorker.killed, (poison, 99, 0), (passing, 0, 1), (passing, 0, 2), (passing, 0, 3)
        )
    assert {task: found[task] for task in (1, 2, 3)} == {1: 1, 2: 2, 3: 3}
    assert isinstance(found[0], TaskFailed)
    assert found[0].attempts == 2
    assert "its worker died" in found[0].reason
    assert caplog.text.count(", which died") == 2


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_worker_that_ends_between_two_maps(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    with on_ray(attempts=1, stall_timeout_s=2) as workers:
        first = results(workers, ScriptedWorker.where, ())[0][0]
        os.kill(first, number)
        second = results(workers, ScriptedWorker.where, ())[0][0]  # at the first attempt
    assert second != first
    assert (", which died" if number == signal.SIGKILL else "no progress for 2 s") in caplog.text


@pytest.mark.usefixtures("ray_here")
def test_a_worker_that_cannot_be_reached_for_a_moment_is_not_dead(caplog: pytest.LogCaptureFixture) -> None:
    cut = 0

    def on_progress(images: int) -> None:
        nonlocal cut
        if images and not cut:
            (process,) = actors()
            cut = cut_connections(process)

    with on_ray(attempts=1) as workers:
        before = results(workers, ScriptedWorker.where, ())[0][0]
        assert dict(workers.map(ScriptedWorker.slow, [(3, 0), (3, 1)], on_progress)) == {0: 0, 1: 1}
        assert results(workers, ScriptedWorker.where, ())[0][0] == before
    assert cut
    assert "a worker is unreachable, trying again" in caplog.text
    assert "died" not in caplog.text


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    "how", [pytest.param("raises", marks=pytest.mark.slow), "dies", pytest.param("hangs", marks=pytest.mark.slow)]
)
def test_a_set_up_that_fails_is_tried_again(tmp_path: Path, how: str) -> None:
    bad = making_badly(tmp_path / "log", 1, how)
    # It imports torch in this time, on a machine that may have other things to do.
    with on_ray(make=bad, set_up_timeout_s=30 if how == "hangs" else 600) as workers:
        assert results(workers, ScriptedWorker.double, (1,)) == {0: 2}


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "no worker can be started: 2 setups failed in a row, the last with: OSError: no weights"),
        pytest.param("dies", "no worker can be started: 2 setups failed in a row", marks=pytest.mark.slow),
        ("refuses", "the backbone is not the driver's"),
    ],
)
def test_where_no_set_up_succeeds_the_job_ends(tmp_path: Path, how: str, words: str) -> None:
    with (
        on_ray(make=making_badly(tmp_path / "log", 999, how), attempts=2) as workers,
        pytest.raises(JobError, match=words),
    ):
        results(workers, ScriptedWorker.double, (1,))


@pytest.mark.usefixtures("ray_here")
def test_actors_are_gone_at_the_end() -> None:
    with on_ray() as workers:
        assert results(workers, ScriptedWorker.double, (1,)) == {0: 2}
        assert len(actors()) == 1
    end = time.monotonic() + 20
    while actors() and time.monotonic() < end:
        time.sleep(0.1)
    assert not actors()
