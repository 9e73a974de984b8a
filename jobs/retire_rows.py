"""Take rows of a store out of use, or take them back into use.

    python -m jobs.retire_rows --store features/ --keys n01440764/a.jpg n01440764/b.jpg --reason "blurred"
    python -m jobs.retire_rows --store features/ --keys-file withdrawn.txt --reason "consent withdrawn"
    python -m jobs.retire_rows --store features/ --rows 17 20:30 --restore

Readers leave retired rows out, and refuse to read one, with the reason. All rows keep their numbers, and their features
stay in the store: `jobs/convert_store.py` and `jobs/merge_stores.py` make stores without them. A key that several rows
have stands for all of them.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.command_line import DONE, run

if TYPE_CHECKING:
    from densefeat.store import FeatureStore

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class RetireConfig:
    """Options: the store, its rows, and why they are retired."""

    # Folder or URI of the store. No job may be writing to it.
    store: str
    # Row numbers, negative to count from the end, or ranges such as 20:30.
    rows: tuple[str, ...] = ()
    # Keys of rows.
    keys: tuple[str, ...] = ()
    # Text file or URI with a key on each line.
    keys_file: str | None = None
    # Leave out keys that the store does not have: of a list for several stores.
    ignore_unknown: bool = False
    # Why the rows are retired, in words: readers show it.
    reason: str | None = None
    # Take the rows back into use.
    restore: bool = False
    # Take all retired rows back into use.
    restore_all: bool = False

    def __post_init__(self) -> None:
        """Check the options that need no access to files."""
        named = bool(self.rows or self.keys or self.keys_file)
        if self.restore and self.restore_all:
            raise ValueError("--restore and --restore-all exclude each other")
        if self.restore_all and named:
            raise ValueError("--restore-all takes all rows back: pass --restore for some of them")
        if not self.restore_all and not named:
            raise ValueError("no rows were named: pass --rows, --keys or --keys-file")
        if (self.restore or self.restore_all) and self.reason is not None:
            raise ValueError("--reason is for rows that are retired, not for those that are taken back")
        if not (self.restore or self.restore_all) and not (self.reason or "").strip():
            raise ValueError('--reason is missing: say why the rows are retired, such as --reason "consent withdrawn"')
        if not (self.reason or "").isprintable():
            raise ValueError(f"--reason must be one line of text: got {self.reason!r}")


def retire_rows(config: RetireConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        StoreError: there is no store, or it is damaged.
        JobError: it does not have some of the rows, which then stay as they are; or a job is writing to the store.
    """
    from densefeat.storage.objects import Objects
    from densefeat.store import FeatureStore
    from pipeline.io.storage import check_writable, storage_explained
    from pipeline.store.lease import Lease
    from pipeline.store.reports import keep_card
    from pipeline.store.retirement import restore, restore_all, retire, without_features

    store, objects = FeatureStore(config.store), Objects(config.store)
    rows = _rows(config, store)
    check_writable(objects, f"--store {config.store}")
    with storage_explained(objects.uri), Lease(objects, None) as lease:
        if config.restore_all:
            restore_all(objects, lease.check)
            logger.info("%s: all rows that have features are in use", config.store)
        elif config.restore:
            changed = restore(objects, rows, lease.check)
            logger.info("%s: taken back into use: %s of %s rows", config.store, f"{changed:,}", f"{len(rows):,}")
        else:
            changed = retire(objects, rows, config.reason or "", lease.check)
            before = len(rows) - changed
            logger.info("%s: rows retired: %s; retired already: %s", config.store, f"{changed:,}", f"{before:,}")
        if (config.restore or config.restore_all) and (gone := without_features(objects)):
            logger.warning(
                "%s: rows that stay retired, because this store was converted or merged without their features: %s",
                config.store, f"{len(gone):,}",
            )  # fmt: skip
        keep_card(objects)
    return DONE


def _rows(config: RetireConfig, store: "FeatureStore") -> set[int]:
    """Numbers of the rows that the options name.

    Raises:
        JobError: the store does not have some of them, or the file cannot be read.
    """
    from densefeat.arguments import row_numbers
    from pipeline.errors import JobError

    try:
        found = set(row_numbers(config.rows, len(store)))
        keys = {*config.keys, *(_keys_of(config.keys_file) if config.keys_file else ())}
    except ValueError as error:
        raise JobError(str(error)) from error
    if not keys:
        return found
    unknown = set(keys)
    for row, key in enumerate(store.keys):
        if key in keys:
            found.add(row)
            unknown.discard(key)
    if unknown and config.ignore_unknown:
        logger.info("%s: keys that it does not have: %s of %s", config.store, f"{len(unknown):,}", f"{len(keys):,}")
    elif unknown:
        shown = ", ".join(map(repr, sorted(unknown)[:_SHOWN])) + (", …" if len(unknown) > _SHOWN else "")
        raise JobError(
            f"{config.store} does not have {len(unknown):,} of the {len(keys):,} keys: {shown}. Nothing was changed. "
            f"Its keys look like {store.keys[0]!r}; --ignore-unknown leaves out those that it does not have"
        )
    return found


def _keys_of(file: str) -> list[str]:
    from densefeat.storage.objects import Objects
    from densefeat.storage.places import split_place
    from pipeline.errors import JobError
    from pipeline.io.storage import storage_explained

    folder, name = split_place(file)
    try:
        with storage_explained(f"--keys-file {file}", "read"):
            text = Objects(folder).get(name).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"--keys-file {file} cannot be read: {error}") from error
    # Not splitlines: a key may have other characters that it takes for the end of a line.
    keys = [key for line in text.split("\n") if (key := line.removesuffix("\r"))]
    if not keys:
        raise JobError(f"--keys-file {file} has no keys")
    return keys


if __name__ == "__main__":
    run(RetireConfig, retire_rows, __doc__ or "", interrupted="run the same command again")
