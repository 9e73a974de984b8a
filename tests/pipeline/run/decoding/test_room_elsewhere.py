"""When a worker decodes elsewhere, and how often at once."""

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from pipeline.run.feature_worker import Turns
from pipeline.run.ray.decoding.elsewhere import Room
from tests.helpers.killing import wait_for


def test_turns_count_those_who_wait() -> None:
    turns = Turns(1)
    with ThreadPoolExecutor(2) as pool:
        with turns:
            assert turns.waiting == 0
            waiting = [pool.submit(turns.acquire) for _ in range(2)]
            wait_for(lambda: turns.waiting == 2)
        wait(waiting, timeout=30, return_when=FIRST_COMPLETED)
        turns.release()
        for future in waiting:
            future.result(30)
    assert turns.waiting == 0


def test_room_is_for_as_many_as_found_a_place() -> None:
    room = Room()
    assert all(room.take(0.0) for _ in range(5))
    for _ in range(2):
        room.placed()
    for _ in range(3):
        room.ended(False)
        room.shrink(5.0)
    assert not room.take(6.0)
    room.ended(True)
    assert room.take(7.0)  # in its place
    room.placed()
    assert not room.take(14.0)
    assert room.take(15.0)  # one more, which waits
    assert not room.take(15.1)
    room.ended(True)
    room.placed()  # it took the place of another
    assert room.take(15.2)
    room.placed()  # and this one found a third
    assert room.take(15.3)
    assert not room.take(15.4)
    room.ended(False)
    room.shrink(20.3)
    assert not room.take(21.0)
    for _ in range(3):  # all of their processes are killed
        room.ended(True)
        room.shrink(22.0)
    assert not room.take(23.0)
    assert room.take(32.0)
    assert not room.take(32.1)
