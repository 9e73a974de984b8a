"""Keep texts for people and their tools in the store: the report of a run, and a card. Nothing depends on them."""

import json
import logging
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from densefeat import layout
from densefeat.console.describe import MADE, card
from densefeat.errors import DensefeatError
from densefeat.storage.objects import Objects
from densefeat.store import FeatureStore

__all__ = ["card_is_made", "keep_card", "keep_report"]

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


def keep_card(objects: Objects) -> bool:
    """Write the card of a finished store, unless there is a text that somebody wrote.

    Returns:
        Whether the store has a card, of what it has now. If the storage failed, that is a warning, not an error.
    """
    try:
        if not objects.exists(layout.MANIFEST):
            return False
        if objects.exists(layout.CARD) and not card_is_made(objects):
            return False
        text = card(FeatureStore(objects.uri, objects.storage_options))
        objects.put(layout.CARD, text.encode(errors="backslashreplace"))  # bytes of a path that are no text
    except (DensefeatError, OSError) as error:
        logger.warning("the card of the store could not be written: %s", error)
        return False
    return True


def card_is_made(objects: Objects) -> bool:
    """Whether the store has a card that densefeat wrote, and that nobody made their own by deleting its second line."""
    try:
        lines = objects.get(layout.CARD).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return False
    return len(lines) > 1 and lines[1].startswith(MADE)
