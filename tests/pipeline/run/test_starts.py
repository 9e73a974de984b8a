"""When workers are started again, and when a job ends because none can be: the policy, with a clock of its own."""

from typing import Any

import pytest

from pipeline.errors import JobError
from pipeline.run.ray.nodes import NodeFailures
from pipeline.run.ray.starts import WorkerStarts


def starts(count: int, **options: Any) -> WorkerStarts:
    return WorkerStarts(count, attempts=3, timeout_s=options.pop("timeout_s", 100), **options)


def fail(policy: WorkerStarts, slot: int, now: float) -> None:
    policy.on_a_node(slot, now)
    policy.failed(slot, "no such weights", now)


def test_all_are_asked_for_once() -> None:
    policy = starts(3)
    assert policy.due(0) == [0, 1, 2]
    assert policy.due(1) == []


def test_where_no_set_up_succeeds_the_job_ends() -> None:
    policy, now = starts(2), 0.0
    for _ in range(2):
        for slot in policy.due(now):
            fail(policy, slot, now)
        now += 300
    fail(policy, *policy.due(now)[:1], now)
    with pytest.raises(JobError, match=r"6 setups failed in a row, .*no such weights"):
        fail(policy, 1, now)


def test_a_bad_node_among_good_ones_does_not_end_the_job() -> None:
    policy, now = starts(2), 0.0
    policy.due(now)
    policy.on_a_node(0, now)
    policy.ready(0)
    for _ in range(50):
        fail(policy, 1, now)
        now += 300
        assert policy.due(now) == [1]


def test_deaths_far_apart_do_not_add_up() -> None:
    """Three over a whole job, with successes between them."""
    policy, now = starts(1), 0.0
    for _ in range(10):
        for _ in range(2):
            assert policy.due(now) == [0]
            fail(policy, 0, now)
            now += 300
        assert policy.due(now) == [0]
        policy.on_a_node(0, now)
        policy.ready(0)
        policy.gone(0)


def test_set_ups_that_fail_are_tried_ever_more_rarely() -> None:
    policy, now, waits = starts(2, first_wait_s=5), 0.0, []
    policy.due(now)
    policy.on_a_node(0, now)
    policy.ready(0)
    for _ in range(9):
        fail(policy, 1, now)
        wait = next(wait for wait in range(1000) if policy.due(now + wait))
        waits.append(wait)
        now += wait
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_workers_that_still_set_up_may_succeed() -> None:
    policy, now = starts(2), 0.0
    policy.due(now)
    policy.on_a_node(0, now)
    for _ in range(5):
        fail(policy, 1, now)
        now += 300
        policy.due(now)


def test_nodes_may_still_come_but_not_for_ever() -> None:
    policy = starts(2, nodes_come_s=600)
    policy.due(0)
    for now in (0, 100, 200, 300, 599):
        fail(policy, 1, now)
        policy.due(now + 300)
    with pytest.raises(JobError, match="6 setups failed in a row"):
        fail(policy, 1, 600)


def test_a_worker_that_died_after_it_was_ready_is_replaced_at_once() -> None:
    policy = starts(1)
    policy.due(0)
    policy.on_a_node(0, 0)
    policy.ready(0)
    policy.gone(0)
    assert policy.due(0) == [0]


def test_the_time_of_a_set_up_counts_from_when_it_is_on_a_node() -> None:
    policy = starts(2, timeout_s=100)
    policy.due(0)
    assert policy.overdue(100_000) == []  # both wait for a node
    assert not policy.any_on_a_node
    policy.on_a_node(1, 100_000)
    assert policy.overdue(100_100) == []
    assert policy.overdue(100_101) == [1]
    policy.failed(1, "it took too long", 100_101)
    assert policy.overdue(200_000) == []


def test_more_workers_come_while_tasks_wait_and_go_when_none_does() -> None:
    policy = starts(5, least=2, idle_s=30)
    assert policy.due(0, 0) == [0, 1]
    assert policy.due(1, 0) == []
    for slot in (0, 1):
        policy.on_a_node(slot, 2)
        policy.ready(slot)
    assert policy.due(3, 1) == [2]
    assert policy.due(4, 1) == []  # it is coming
    assert policy.due(5, 99) == [3, 4]
    policy.on_a_node(2, 6)
    policy.ready(2)
    assert policy.surplus([0, 1, 2], 34) == []  # at 5 some waited
    assert policy.due(34, 0) == []
    assert policy.surplus([2], 36) == [3, 4, 2]  # requests first
    for slot in (3, 4, 2):
        policy.gone(slot)
    assert policy.surplus([0, 1], 37) == []
    assert policy.due(37, 0) == []
    assert policy.due(38, 1) == [2]


def test_a_fixed_number_of_workers_is_kept() -> None:
    policy = starts(2)
    assert policy.due(0, 0) == [0, 1]
    for slot in (0, 1):
        policy.on_a_node(slot, 0)
        policy.ready(slot)
    assert policy.surplus([0, 1], 1000) == []
    policy.gone(1)
    assert policy.due(1000, 0) == [1]


def test_slots_are_added_for_nodes_that_join() -> None:
    policy = starts(1)
    assert policy.due(0, 5) == [0]
    assert policy.add() == 1
    assert policy.due(1, 5) == [1]
    assert policy.count == 2


def test_a_node_on_which_workers_keep_failing_is_left_out_for_a_while() -> None:
    nodes = NodeFailures(failures=3, first_rest_s=600)
    assert [nodes.failed("bad", now) for now in (0, 1, 2)] == [False, False, True]
    assert nodes.left_out(["bad", "good"], 3) == ["bad"]
    assert nodes.left_out(["bad"], 3) == []  # better than none
    assert nodes.left_out(["bad", "good"], 602) == []
    for now in (602, 603, 604):
        nodes.failed("bad", now)
    assert nodes.left_out(["bad", "good"], 1803) == ["bad"]  # twice as long
    assert nodes.left_out(["bad", "good"], 1804) == []
    nodes.succeeded("bad")
    assert not nodes


def test_a_node_with_a_wrong_clock_gets_no_work_even_if_it_is_the_last() -> None:
    nodes = NodeFailures(failures=2, first_rest_s=600)
    nodes.has_wrong_clock("late", 0)
    assert nodes.left_out(["late", "good"], 1) == ["late"]
    assert nodes.left_out(["late"], 1) == ["late"]
    assert [nodes.failed("bad", now) for now in (1, 2)] == [False, True]
    assert nodes.left_out(["late", "bad", "good"], 3) == ["late", "bad"]
    assert nodes.left_out(["late", "bad"], 3) == ["late"]  # the bad one is better than none
    assert nodes.left_out(["late", "good"], 600) == []  # its clock may be right by now
    nodes.has_wrong_clock("late", 601)
    assert nodes.left_out(["late", "good"], 1800) == ["late"]


def test_failures_of_a_node_do_not_add_up_over_successes() -> None:
    nodes = NodeFailures(failures=3)
    for now in range(20):
        assert not nodes.failed("node", now)
        if now % 2:
            nodes.succeeded("node")
