"""The images of a job: listed; or those of the store that it continues, and perhaps new ones to be appended."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from densefeat.layout import MANIFEST
from densefeat.rows.index import stored_index
from densefeat.storage.objects import Objects
from densefeat.storage.places import absolute_place
from pipeline.errors import JobError
from pipeline.images.listing.files import Scan, ScanMap
from pipeline.images.listing.findings import Finding, refuse_losses
from pipeline.images.listing.source import Source, keys_digest, list_images
from pipeline.images.new_rows import new_rows
from pipeline.store.appending.growth import Growth, begun_growth
from schemas.attributes import AppendedSource, StoreAttributes
from schemas.configuration import SourceConfiguration
from schemas.index import REFERENCES
from schemas.options import FeatureConfig, UpsampleConfig

__all__ = ["JobImages", "cluster_scan_map", "images_of", "listed"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class JobImages:
    """The images of a job, one per row of its store.

    Attributes:
        source: the source in the store's configuration, as the options ask for it.
        references: ``schemas.index.REFERENCES``.
        class_names: of the labels.
        findings: parts of the source that are not used; empty if nothing was listed.
        growth: rows that the job has to append first, some of which another job may have begun to append.
        waiting: number of new images that can be appended only when the store is finished.
    """

    source: SourceConfiguration
    references: pa.Table
    class_names: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    growth: Growth | None = None
    waiting: int = 0


def images_of(config: UpsampleConfig, resumed: StoreAttributes | None) -> JobImages:
    """The images of a job.

    When a store is continued, its images are read from its index and not listed again, so that rows keep their numbers.

    Args:
        config: options of the job.
        resumed: attributes of the store that is continued; None: a new one is made.

    Raises:
        JobError: the images cannot be listed, too many of them are lost, or they cannot be appended to the store.
        StorageUnavailable: the storage does not answer.
    """
    if resumed and resumed.setup_complete:
        return _continued(config, resumed)
    if config.append:
        raise JobError(f"--append: {config.store} is still being set up: run the job that started it with --resume")
    source = listed(config)
    refuse_losses(config.images, source.findings, source.candidates, config.max_failed_share)
    configuration = SourceConfiguration(
        images=absolute_place(config.images),
        limit=config.limit,
        kind=source.kind,
        image_column=source.image_column,
        rows=source.references.num_rows,
        keys_sha256=keys_digest(source.references),
    )
    return JobImages(configuration, source.references, source.class_names, source.findings)


def _continued(config: UpsampleConfig, stored: StoreAttributes) -> JobImages:
    objects, first = Objects(config.store), stored.configuration.source
    growth = begun_growth(objects)
    if growth is None:
        references = stored_index(objects).select(REFERENCES.names).cast(REFERENCES)
        there = JobImages(first, references, stored.class_names)
        appended = stored.appended
    else:
        there = JobImages(first, growth.references, growth.class_names, growth=growth)
        appended = growth.appended
    if config.append:
        return _appended(config, there, appended, finished=growth is None and objects.exists(MANIFEST))
    images = absolute_place(config.images)
    column = first.image_column if config.image_column is None else config.image_column
    if images in {source.images for source in appended}:
        return replace(there, source=replace(first, image_column=column))
    return replace(there, source=replace(first, images=images, limit=config.limit, image_column=column))


def _appended(
    config: UpsampleConfig, there: JobImages, appended: tuple[AppendedSource, ...], *, finished: bool
) -> JobImages:
    """The images of a store and those of ``--images`` that it does not have."""
    images, first = absolute_place(config.images), there.source
    of_column = first.kind in ("parquet", "tar") and config.image_column is None
    source = listed(replace(config, image_column=first.image_column) if of_column else config)
    if source.kind != first.kind:
        raise JobError(
            f"--append: the images {config.images} are of the kind {source.kind}, those of {config.store} of the kind "
            f"{first.kind}: a store has images of one kind. Make a store of their own, with --pca {config.store}"
        )
    if source.kind == "parquet" and source.image_column != first.image_column:
        raise JobError(
            f"--append: the images of {config.store} are in the column {first.image_column}: got --image-column "
            f"{source.image_column}, expected the same"
        )
    refuse_losses(config.images, source.findings, source.candidates, config.max_failed_share)
    new = new_rows(there.references, there.class_names, source)
    _say(config.images, source, there.references, new.references)
    if new.labels_left_out:
        logger.warning(
            "the labels of %s new images are left out: %s", f"{new.labels_left_out:,}",
            "they are numbers, and the store has names of classes" if there.class_names
            else "they have names of classes, and the store has only numbers",
        )  # fmt: skip
    if not len(new.references):
        return replace(there, findings=source.findings)
    if not finished:
        return replace(there, findings=source.findings, waiting=len(new.references))
    growth = Growth(
        rows_before=len(there.references),
        references=pa.concat_tables([there.references, new.references]).combine_chunks(),
        class_names=new.class_names,
        appended=(*appended, AppendedSource(images, len(new.references), keys_digest(new.references))),
    )
    return JobImages(first, growth.references, growth.class_names, source.findings, growth)


def _say(images: str, source: Source, there: pa.Table, new: pa.Table) -> None:
    """Say how many images the store has already, and how many of these it read from another place."""
    known = len(source.references) - len(new)
    logger.info("%s: %s images, %s of them new", images, f"{len(source.references):,}", f"{len(new):,}")
    places = pc.index_in(source.references["key"], value_set=there["key"].combine_chunks())
    uris = there["uri"].combine_chunks().take(places.combine_chunks())  # null where the image is new
    moved = source.references.select(["key", "uri"]).append_column("there", uris)
    moved = moved.filter(pc.fill_null(pc.not_equal(moved["uri"], moved["there"]), False))
    if len(moved):
        logger.warning(
            "%s of the %s images that are not new have a key of the store, but lie elsewhere, e.g. %s: %s, in the "
            "store %s. A row keeps the image that it was made of; if they are other images, give them other names",
            f"{len(moved):,}", f"{known:,}", *(moved[name][0].as_py() for name in ("key", "uri", "there")),
        )  # fmt: skip


def listed(config: FeatureConfig) -> Source:
    """List the images of a job, on the Ray cluster if it has one.

    Raises:
        JobError, StorageUnavailable: as for `list_images`.
    """
    scan_map = cluster_scan_map() if config.worker_range != (0, 0) else None
    return list_images(config.images, limit=config.limit, image_column=config.image_column, scan_map=scan_map)


def cluster_scan_map() -> ScanMap | None:
    """Map that scans the files of a large dataset on the Ray cluster at RAY_ADDRESS; None if that is not set."""
    if not os.environ.get("RAY_ADDRESS"):
        return None

    def scan(function: Callable[[str], Scan], paths: Sequence[str]) -> Iterator[Scan]:
        from pipeline.run.ray import cluster  # deferred: importing ray takes a second

        return cluster.map_on_cluster(function, paths)

    return scan
