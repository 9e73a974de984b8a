"""Keep the report of a job's run in the store, for people and their tools; nothing depends on it."""

import json
import logging
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from densefeat import layout
from densefeat.errors import DensefeatError
from densefeat.storage.objects import Objects

__all__ = ["keep_report"]

logger = logging.getLogger(__name__)


def keep_report(objects: Objects, report: Mapping[str, Any]) -> str | None:
    """Write a report under a new key.

    Args:
        objects: the store.
        report: `pipeline.reporting.report.Report.to_dict`.

    Returns:
        Its key; None if the storage failed: the run is done all the same, so this is a warning, not an error.
    """
    key = layout.report_key(f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}", uuid.uuid4().hex[:8])
    try:
        objects.create(key, json.dumps(report, indent=2).encode())
    except (DensefeatError, OSError) as error:
        logger.warning("the report of this run could not be kept in the store: %s", error)
        return None
    return key
