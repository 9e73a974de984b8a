"""Check the locations that a job names: a store that may exist already, and images that must not overlap with it."""

import os
from collections.abc import Sequence

from densefeat.storage.objects import Objects
from densefeat.storage.places import absolute_place, is_local, overlap
from pipeline.errors import JobError
from pipeline.images.listing.files import pattern_finds
from pipeline.io.storage import storage_explained
from pipeline.store.layout import existing_store, foreign_keys, remains
from schemas.attributes import StoreAttributes
from schemas.configuration import StoreConfiguration, incompatibilities
from schemas.options import UpsampleConfig

__all__ = ["check_apart", "check_same", "stored_attributes_at"]


def stored_attributes_at(config: UpsampleConfig) -> StoreAttributes | None:
    """Attributes of the store at ``--store``; None if there is no store.

    Raises:
        JobError: the location holds other objects, parts of a store that are not to be overwritten, or a store that
            the options neither resume nor overwrite.
    """
    with storage_explained(f"--store {config.store}"):
        objects = Objects(config.store)
        stored = existing_store(objects)
        if stored is None and (others := foreign_keys(objects)):
            raise JobError(f"--store {config.store!r} is not empty ({_few(others)}): choose an empty location")
        if stored is None and not config.overwrite and (parts := remains(objects)):
            stored = existing_store(objects)  # another job may just have set it up
            if stored is None:
                raise JobError(
                    f"--store {config.store} holds parts of a store ({_few(parts)}), but no zarr.json: a deletion or a "
                    "copy was interrupted; pass --overwrite to delete them and start over"
                )
        if stored and not (config.continues or config.overwrite):
            raise JobError(
                f"--store {config.store} exists: pass --resume to continue it, --append to add images to it, or "
                "--overwrite to replace it"
            )
        if stored is None and config.append:
            raise JobError(f"--append: there is no store at {config.store}: make it first, without --append")
    return stored


def check_same(stored: StoreAttributes, configuration: StoreConfiguration, config: UpsampleConfig) -> None:
    """Refuse to mix two configurations in one store.

    Raises:
        JobError: the configurations are not compatible; the message lists each difference.
    """
    if different := incompatibilities(stored.configuration, configuration):
        raise JobError(
            f"--{'append' if config.append else 'resume'}: the store {config.store} was made with a different "
            "configuration:\n  "
            + "\n  ".join(different)
            + "\nUse the original options, choose another --store, or pass --overwrite to start over"
        )


def check_apart(images: str, option: str, place: str, names: Sequence[str] = ()) -> None:
    """Refuse an output location that overlaps with the images: the next listing would mix the two.

    Args:
        images: folder or URI of images.
        option: command-line option that names the output location.
        place: folder or URI of the output.
        names: of files that will be written there, and that a listing of images could take.

    Raises:
        JobError: one encloses the other, or a pattern finds the output or one of the files.
    """
    root = place.rstrip("/")
    if pattern_finds(images, root, *(f"{root}/{name}" for name in names)):
        raise JobError(
            f"the images {images} would include {option} {place}: use a folder for {option} that the pattern does not "
            "match"
        )
    if is_local(images) and not os.path.isdir(absolute_place(images)):  # noqa: PTH112 - a pattern may be a long one
        return  # files or a pattern: an output folder that holds them is refused as not empty
    if overlap(images, place):
        raise JobError(f"{option} {place} and the images {images} overlap: use a separate folder for {option}")


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (" …" if keys[3:] else "")
