"""Leave nodes out on which workers keep failing: a broken GPU or a full disk fails every worker that is placed there.

Independent of Ray. Time is passed in, as seconds of a monotonic clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["NodeFailures"]

_FAILURES = 3
_FIRST_REST_S, _LONGEST_REST_S = 600.0, 3600.0


@dataclass
class _Node:
    in_row: int = 0  # failures since a task was done there
    rests: int = 0
    wrong_clock: bool = False
    out_until: float = float("-inf")


class NodeFailures:
    """Failures of workers by node. Deaths of tasks that are suspects themselves are not to be recorded.

    Args:
        failures: failures in a row after which a node is left out.
        first_rest_s: how long it is left out; doubled every time, up to an hour.
    """

    def __init__(self, *, failures: int = _FAILURES, first_rest_s: float = _FIRST_REST_S) -> None:
        self._failures, self._first_rest_s = failures, first_rest_s
        self._nodes: dict[str, _Node] = {}

    def __bool__(self) -> bool:
        """Whether any node has failures."""
        return bool(self._nodes)

    def failed(self, node: str | None, now: float) -> bool:
        """Record that a worker failed on a node; returns whether the node is left out from now on."""
        if node is None:
            return False
        state = self._nodes.setdefault(node, _Node())
        state.in_row += 1
        if state.in_row < self._failures:
            return False
        self._rest(state, now)
        return True

    def has_wrong_clock(self, node: str, now: float) -> None:
        """Record that the storage refuses a node for its clock: it is left out at once, whatever the others do."""
        state = self._nodes.setdefault(node, _Node())
        state.wrong_clock = True
        self._rest(state, now)

    def succeeded(self, node: str | None) -> None:
        """Record that a task was done on a node."""
        if node in self._nodes:
            del self._nodes[node]

    def left_out(self, nodes: Iterable[str], now: float) -> list[str]:
        """Which of the living nodes that can have workers get none now.

        If that were all, only those with a wrong clock: on the others, some work may succeed.
        """
        living = list(nodes)
        out = [node for node in living if node in self._nodes and self._nodes[node].out_until > now]
        return out if len(out) < len(living) else [node for node in out if self._nodes[node].wrong_clock]

    def _rest(self, state: _Node, now: float) -> None:
        state.in_row = 0
        state.out_until = now + min(self._first_rest_s * 2**state.rests, _LONGEST_REST_S)
        state.rests += 1
