"""Rows of batches, as the tests of datasets compare them."""

from typing import Any

import pytest

from tests.helpers.stores import FAILED_ROWS, ROWS

GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]
FORKED = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def rows_of(batches: Any) -> list[list[int]]:
    return [batch["row"].tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [row for rows in rows_of(batches) for row in rows]
