"""Who gets which task, and when: the policy alone, with a clock of its own."""

import random

import pytest

from pipeline.run.queue import TaskFailed, TaskQueue


def queue(count: int, attempts: int = 3, **options: float) -> TaskQueue[str]:
    return TaskQueue(count, attempts=attempts, first_wait_s=options.pop("first_wait_s", 5), **options)  # type: ignore[arg-type]


def test_tasks_spread_over_the_workers_first() -> None:
    tasks = queue(5)
    tasks.join("a", "node 1", 3, 0)
    tasks.join("b", "node 2", 3, 0)
    assert tasks.hand_out(0) == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4)]
    assert tasks.hand_out(0) == []


def test_a_worker_gets_no_more_than_it_has_room_for() -> None:
    tasks = queue(5)
    tasks.join("a", None, 2, 0)
    assert tasks.hand_out(0) == [("a", 0), ("a", 1)]
    tasks.done(0, 1)
    assert tasks.hand_out(1) == [("a", 2)]
    assert tasks.left == 4


def test_a_task_that_failed_is_tried_after_all_others_and_ever_later() -> None:
    tasks = queue(3, attempts=4)
    tasks.join("a", None, 1, 0)
    assert tasks.hand_out(0) == [("a", 0)]
    assert tasks.failed(0, "no", 0, suspect=True) is None
    for task in (1, 2):
        assert tasks.hand_out(100) == [("a", task)]
        tasks.done(task, 100)
    for failures, wait in ((1, 5), (2, 10), (3, 20)):
        failed_at = 1000 * failures
        if failures > 1:
            tasks.failed(0, "no", failed_at, suspect=True)
            assert tasks.hand_out(failed_at + wait - 0.1) == []
        assert tasks.hand_out(failed_at + wait) == [("a", 0)]
    assert tasks.failed(0, "the last reason", 9000, suspect=True) == TaskFailed(4, "the last reason")
    assert tasks.left == 0


def test_the_wait_between_attempts_has_a_bound() -> None:
    tasks = queue(1, attempts=50)
    tasks.join("a", None, 1, 0)
    now = 0.0
    for _ in range(49):
        assert tasks.hand_out(now)
        assert tasks.failed(0, "no", now, suspect=False) is None
        now += 60
    assert tasks.hand_out(now)


def test_elsewhere_first_another_node_then_another_worker() -> None:
    tasks = queue(1, attempts=9)
    for worker, node in (("a", "1"), ("b", "1"), ("c", "2")):
        tasks.join(worker, node, 1, 0)
    order, now = [], 0.0
    for _ in range(4):
        ((worker, _),) = tasks.hand_out(now)
        order.append(worker)
        tasks.failed(0, "no", now, suspect=True)
        now += 60
    assert order[:3] == ["a", "c", "b"]


def test_a_better_worker_is_waited_for_but_not_for_ever() -> None:
    tasks = queue(2, elsewhere_s=60)
    tasks.join("a", "1", 1, 0)
    tasks.join("b", "2", 1, 0)
    assert tasks.hand_out(0) == [("a", 0), ("b", 1)]
    tasks.failed(0, "no", 0, suspect=True)
    assert tasks.hand_out(5) == []  # b is busy, and would be better
    assert tasks.hand_out(64) == []
    assert tasks.hand_out(65) == [("a", 0)]


def test_a_paused_worker_is_not_waited_for() -> None:
    tasks = queue(1)
    tasks.join("a", "1", 1, 0)
    assert tasks.hand_out(0) == [("a", 0)]
    tasks.failed(0, "no", 0, suspect=True)
    tasks.join("b", "2", 1, 0)
    tasks.pause("b")
    assert tasks.hand_out(5) == [("a", 0)]


def test_a_suspect_runs_alone() -> None:
    tasks = queue(3)
    tasks.join("a", None, 2, 0)
    tasks.hand_out(0)
    tasks.failed(0, "killed its worker", 0, suspect=True)
    assert tasks.hand_out(10) == [("a", 2)]
    tasks.done(1, 10)
    assert tasks.hand_out(10) == []  # 2 is still there
    tasks.done(2, 11)
    assert tasks.hand_out(11) == [("a", 0)]
    assert tasks.left == 1


def test_nothing_joins_a_suspect() -> None:
    tasks = queue(2)
    tasks.join("a", None, 2, 0)
    tasks.hand_out(0)
    for task in (0, 1):
        tasks.failed(task, "killed its worker", 0, suspect=True)
    assert tasks.hand_out(10) == [("a", 0)]
    assert tasks.hand_out(10) == []


def test_tasks_that_the_storage_failed_run_together() -> None:
    tasks = queue(4)
    tasks.join("a", None, 4, 0)
    tasks.hand_out(0)
    for task in range(4):
        tasks.failed(task, "the storage did not answer", 0, suspect=False)
    assert len(tasks.hand_out(5)) == 4


def test_a_lost_node_costs_no_attempt_and_no_wait() -> None:
    tasks = queue(2, attempts=1, most_losses=10)
    for loss in range(10):
        tasks.join(f"worker {loss}", "spot", 2, loss)
        assert {task for _, task in tasks.hand_out(loss)} == {0, 1}
        assert tasks.leave(f"worker {loss}") == [0, 1]
        for task in (0, 1):
            assert tasks.lost(task, "its node was lost", loss) is None
    tasks.join("last", "spot", 2, 11)
    tasks.hand_out(11)
    assert tasks.lost(0, "its node was lost", 11) == TaskFailed(1, "its node was lost")
    tasks.done(1, 12)
    assert tasks.left == 0


def test_a_task_that_its_worker_could_not_begin_costs_nothing() -> None:
    tasks = queue(1, attempts=1, most_losses=0)
    for number in range(20):
        tasks.join(f"worker {number}", "late", 1, number)
        assert tasks.hand_out(number) == [(f"worker {number}", 0)]
        assert tasks.leave(f"worker {number}") == [0]
        tasks.returned(0, number)
        assert not tasks.runs_alone(0)
    assert tasks.left == tasks.waiting == 1


def test_a_task_remembers_the_worker_that_left_with_it() -> None:
    tasks = queue(1)
    tasks.join("a", "1", 1, 0)
    tasks.hand_out(0)
    for task in tasks.leave("a"):
        tasks.failed(task, "its worker died", 0, suspect=True)
    tasks.join("its replacement", "1", 1, 0)
    tasks.join("b", "2", 1, 0)
    assert tasks.hand_out(5) == [("b", 0)]


def test_stalled_workers() -> None:
    tasks = queue(2)
    tasks.join("a", None, 1, 0)
    tasks.join("b", None, 1, 0)
    tasks.join("idle", None, 0, 0)
    tasks.hand_out(100)
    assert tasks.stalled(30, 130) == []
    tasks.progressed("a", 120)
    assert tasks.stalled(30, 131) == ["b"]
    tasks.done(1, 131)
    assert tasks.stalled(30, 140) == []
    assert tasks.stalled(30, 151) == ["a"]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_task_ends_once(seed: int) -> None:
    """Workers come and go, tasks fail, are lost, or end; nothing is given out twice, and nothing is left."""
    rng = random.Random(seed)
    count, attempts = 40, 3
    tasks = queue(count, attempts, first_wait_s=1, elsewhere_s=3)
    workers: dict[str, set[int]] = {}
    over: dict[int, str] = {}
    tried = [0] * count
    now, made = 0.0, 0
    while tasks.left:
        now += 1
        assert now < 10_000
        if len(workers) < 4:
            made += 1
            workers[f"w{made}"] = set()
            tasks.join(f"w{made}", f"node {made % 3}", rng.randint(1, 4), now)
        for worker, task in tasks.hand_out(now):
            assert task not in over
            assert not any(task in others for others in workers.values())
            workers[worker].add(task)
        for worker in list(workers):
            happens = rng.random()
            if happens < 0.1:
                had = tasks.leave(worker)
                assert set(had) == workers.pop(worker)
                for task in had:
                    if happens < 0.05:
                        tried[task] += 1
                        result = tasks.failed(task, "died", now, suspect=True)
                    else:
                        result = tasks.lost(task, "lost", now)
                    if result is not None:
                        over[task] = result.reason
            elif workers[worker] and happens < 0.6:
                task = workers[worker].pop()
                if happens < 0.3:
                    tried[task] += 1
                    if tasks.failed(task, "no", now, suspect=happens < 0.2) is not None:
                        over[task] = "no"
                else:
                    tasks.done(task, now)
                    over[task] = "done"
    assert sorted(over) == list(range(count))
    assert all((over[task] == "done") or tried[task] == attempts for task in range(count) if over[task] != "lost")


def outage(tasks: TaskQueue[str]) -> bool:
    return tasks.outage is not None


def test_a_storage_that_answers_nobody_costs_no_attempt_and_one_task_at_a_time_tries_it() -> None:
    tasks = queue(6, attempts=1, outage_s=1000)
    tasks.join("a", None, 2, 0)
    tasks.join("b", None, 2, 0)
    assert len(tasks.hand_out(0)) == 4
    for task in range(4):
        assert tasks.unavailable(task, "no answer", 80) is None
    assert outage(tasks)
    tried, now = [], 80.0
    while now < 1000:
        handed = tasks.hand_out(now)
        assert len(handed) <= 1
        assert tasks.hand_out(now) == []
        for _, task in handed:
            tried.append(now)
            assert tasks.unavailable(task, "no answer", now) is None
        now += 1
    assert 10 < len(tried) < 40  # at most every minute at last
    ((_, task),) = tasks.hand_out(1061)
    tasks.done(task, 1062)
    assert not outage(tasks)
    assert len(tasks.hand_out(1062)) == 4
    assert tasks.left == 5


def test_an_outage_is_not_waited_for_for_ever() -> None:
    tasks = queue(1, attempts=1, outage_s=1000)
    tasks.join("a", None, 1, 0)
    tasks.hand_out(0)
    assert tasks.unavailable(0, "no answer", 80) is None
    tasks.hand_out(1000)
    assert tasks.unavailable(0, "no answer", 1081) == TaskFailed(1, "no answer")
    assert tasks.left == 0


def test_objects_that_do_not_answer_while_others_do_are_given_up() -> None:
    """Even when only they are left."""
    tasks = queue(3, attempts=2)
    tasks.join("a", None, 2, 0)
    assert [task for _, task in tasks.hand_out(0)] == [0, 1]
    tasks.done(1, 50)
    assert tasks.unavailable(0, "no answer", 80) is None
    assert not outage(tasks)
    assert [task for _, task in tasks.hand_out(80)] == [2]
    tasks.done(2, 81)
    assert [task for _, task in tasks.hand_out(500)] == [0]
    assert tasks.unavailable(0, "no answer", 1000) == TaskFailed(2, "no answer")


def test_success_before_an_outage_is_not_success_during_it() -> None:
    tasks = queue(2, attempts=1)
    tasks.join("a", None, 2, 0)
    tasks.hand_out(0)
    tasks.done(1, 4)
    assert tasks.unavailable(0, "no answer, for 75 s", 80) is None
    assert outage(tasks)


def test_whoever_may_be_poison_runs_alone_from_the_start() -> None:
    tasks = queue(3, alone=True)
    tasks.join("a", None, 4, 0)
    tasks.join("b", None, 4, 0)
    assert tasks.hand_out(0) == [("a", 0), ("b", 1)]
    tasks.done(0, 1)
    assert tasks.hand_out(1) == [("a", 2)]


def test_a_million_tasks_cost_nothing_until_they_run() -> None:
    tasks = queue(1_000_000)
    for worker in range(1000):
        tasks.join(f"w{worker}", f"node {worker // 8}", 2, 0)
    handed = tasks.hand_out(0)
    assert len(handed) == 2000
    assert len({worker for worker, _ in handed[:1000]}) == 1000  # breadth first
    assert tasks.waiting == 998_000
    assert len(tasks._troubled) == 0
