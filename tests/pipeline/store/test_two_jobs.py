"""Two jobs, or two runs, that meet at one store: what was asked is compared, what came of it is adopted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densefeat import FeatureStore, layout
from densefeat.layout import step_sha256
from densefeat.storage.objects import Objects
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.run.job import carry_out
from pipeline.run.planning.places import check_apart
from pipeline.run.planning.plan import Plan, make_plan
from pipeline.run.preparation.prepare import prepare
from pipeline.run.shard_worker import ShardWorker, StoreEncoding
from pipeline.run.workers import InlineWorkers
from pipeline.store.layout import claim, delete_store, existing_store
from schemas.attributes import StoreAttributes
from schemas.configuration import PcaConfiguration, StoreConfiguration, incompatibilities
from schemas.options import UpsampleConfig
from tests.helpers.stores import known_configuration


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import skimage

    folder = tmp_path_factory.mktemp("photographs")
    picture = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png")
    for i in range(6):
        picture.crop((40 * i, 20 * i, 40 * i + 200, 20 * i + 200)).save(folder / f"{i}.png")
    return folder


def config(images: Path, store: Path | str, **options: Any) -> UpsampleConfig:
    defaults: dict[str, Any] = {
        "backbone": "resnet18", "weights": "random", "layer": "2", "size": "64", "components": 4, "shard_images": 2,
        "batch_size": 2, "device": "cpu", "workers": 0, "upsampler": "bilinear",
    }  # fmt: skip
    return UpsampleConfig(images=str(images), store=str(store), **{**defaults, **options})


def prepared(plan: Plan) -> StoreEncoding:
    with InlineWorkers(plan.spec) as workers:
        return prepare(plan, Objects(plan.config.store), workers)


def claim_a_bit_apart(plan: Plan, encoding: StoreEncoding, *, scale: float = 1 + 1e-6) -> StoreEncoding:
    """Claim a plan's store as a machine would whose fit differs in the last bits; it dies then."""
    basis = replace(encoding.basis, mean=encoding.basis.mean * np.float32(scale))
    assert encoding.step is not None
    step = encoding.step * np.float32(scale)
    configuration = plan.configuration.with_basis(basis.digest, len(basis.components))
    attributes = StoreAttributes(configuration, {}, plan.class_names, 0.5, step_sha256(step))
    claim(Objects(plan.config.store), attributes, basis, step)
    return StoreEncoding(basis, step, attributes.hash)


def same(a: StoreEncoding, b: StoreEncoding) -> bool:
    return (a.basis.digest, a.configuration_hash) == (b.basis.digest, b.configuration_hash) and np.array_equal(
        np.asarray(a.step), np.asarray(b.step)
    )


def test_equal_options_join_though_the_bits_differ(photographs: Path, tmp_path: Path) -> None:
    """The later job adopts the basis and the steps of the earlier one, even if that died at once."""
    fitted = prepared(make_plan(config(photographs, tmp_path / "first")))
    plan = make_plan(config(photographs, tmp_path / "store", resume=True, shards="1:"))  # before there is a store
    begun = claim_a_bit_apart(plan, fitted)
    assert begun.basis.digest != fitted.basis.digest
    assert same(prepared(plan), begun)
    assert carry_out(plan, 0.0).complete is False
    # A resume of the rest, and one after all that.
    assert upsample(config(photographs, tmp_path / "store", resume=True)) == 0
    assert upsample(config(photographs, tmp_path / "store", resume=True)) == 0
    assert verify(VerifyConfig(store=str(tmp_path / "store"))) == 0
    store = FeatureStore(str(tmp_path / "store"))
    assert Basis.of_store(store).digest == begun.basis.digest
    assert np.array_equal(np.asarray(store.step), np.asarray(begun.step))


@pytest.mark.parametrize("options", [{"components": 3}, {"error_floor": 0.2}, {"layer": "1"}, {"pca_images": 3}])
def test_other_options_do_not_touch_a_claim(photographs: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """A job planned before the claim, with --resume and other options: whether setup is complete or not."""
    late = make_plan(config(photographs, tmp_path / "store", resume=True, **options))
    first = make_plan(config(photographs, tmp_path / "store", resume=True))
    fitted = prepared(make_plan(config(photographs, tmp_path / "elsewhere")))
    claim_a_bit_apart(first, fitted)
    objects = Objects(tmp_path / "store")
    claimed = {key: objects.get(key) for key in objects.list()}
    (name,) = options
    with pytest.raises(JobError, match=rf"with other options: .*(stored|{name})"):
        prepared(late)
    assert {key: objects.get(key) for key in objects.list()} == claimed
    with pytest.raises(JobError, match="a different configuration"):
        make_plan(config(photographs, tmp_path / "store", resume=True, **options))
    carry_out(first, 0.0)
    made = {key: objects.get(key) for key in objects.list()}
    with pytest.raises(JobError, match="with other options"):
        carry_out(late, 0.0)
    assert {key: objects.get(key) for key in objects.list()} == made
    assert verify(VerifyConfig(store=objects.uri)) == 0


def test_a_job_without_resume_does_not_join(photographs: Path, tmp_path: Path) -> None:
    plan = make_plan(config(photographs, tmp_path / "store"))
    assert upsample(config(photographs, tmp_path / "store")) == 0
    with pytest.raises(JobError, match="in the meantime: use --resume"):
        prepared(plan)


def test_overwrite_deletes_the_store_it_was_planned_for(photographs: Path, tmp_path: Path) -> None:
    assert upsample(config(photographs, tmp_path / "store")) == 0
    plans = [make_plan(config(photographs, tmp_path / "store", overwrite=True, components=k)) for k in (2, 3)]
    carry_out(plans[0], 0.0)
    with pytest.raises(JobError, match="not the store that --overwrite was to delete"):
        carry_out(plans[1], 0.0)
    assert FeatureStore(str(tmp_path / "store")).shape[0] == 2
    assert verify(VerifyConfig(store=str(tmp_path / "store"))) == 0


def test_a_job_whose_store_is_overwritten_stops(photographs: Path, tmp_path: Path) -> None:
    plan = make_plan(config(photographs, tmp_path / "store"))
    objects = Objects(plan.config.store)
    with InlineWorkers(plan.spec) as workers:
        encoding = prepare(plan, objects, workers)
        assert upsample(config(photographs, tmp_path / "store", overwrite=True, components=3)) == 0
        before = objects.list()
        # Shards of another configuration are in the ledger; and where they are not yet, the store is another one.
        for _ in range(2):
            with pytest.raises(JobError, match=r"another configuration|another store"):
                list(workers.map(ShardWorker.make_shard, [(objects, 0, plan.shard_references(0), encoding)]))
            assert objects.list() == before
            objects.delete(layout.ledger_key(0))
            objects.delete(layout.shard_key(0))
            before = objects.list()


def test_parts_of_a_store_without_its_head_are_not_built_upon(photographs: Path, tmp_path: Path) -> None:
    assert upsample(config(photographs, tmp_path / "store")) == 0
    (tmp_path / "store" / "zarr.json").unlink()
    for resume in (True, False):
        with pytest.raises(JobError, match=r"holds parts of a store .*, but no zarr.json"):
            upsample(config(photographs, tmp_path / "store", resume=resume))
    assert upsample(config(photographs, tmp_path / "store", overwrite=True, components=3)) == 0
    assert verify(VerifyConfig(store=str(tmp_path / "store"))) == 0
    delete_store(Objects(tmp_path / "store"))
    assert existing_store(Objects(tmp_path / "store")) is None
    assert upsample(config(photographs, tmp_path / "store")) == 0


def test_what_is_compared_and_what_is_adopted() -> None:
    base = known_configuration("abc")
    given = replace(base, pca=PcaConfiguration(4, basis="abc"))
    fit = replace(base, pca=PcaConfiguration(4, fitted_on_images=9))
    fitted = fit.with_basis("abc", 4)
    assert incompatibilities(StoreConfiguration.from_dict(json.loads(json.dumps(fitted.to_dict()))), fit) == []
    assert incompatibilities(given, given) == []
    elsewhere = replace(fit, source=replace(fit.source, images="/b"))
    for stored, asked, words in [
        (fitted, given, "pca.fitted_on_images: stored 9, asked null"),
        (given, fit, 'pca.basis: stored "abc", asked null'),
        (given, given.with_basis("abd", 4), 'pca.basis: stored "abc", asked "abd"'),
        (fitted, replace(fit, pca=PcaConfiguration(4, fitted_on_images=8)), "pca.fitted_on_images: stored 9, asked 8"),
        (fitted, elsewhere, 'source.images: stored "/photos", asked "/b"'),
    ]:
        assert words in incompatibilities(stored, asked)


@pytest.mark.parametrize(
    ("images", "store", "apart"),
    [
        ("{t}/photos", "{t}/photos", False), ("{t}/photos", "{t}/photos/store", False), ("{t}/photos", "{t}", False),
        ("{t}/photos", "{t}/photos2", True), ("file://{t}/photos", "{t}/link/store", False),
        ("{t}/link", "file://{t}/photos/store", False), ("{t}/photos/1.png", "{t}/photos/store", True),
        ("s3://b/photos", "s3://b/photos/store", False), ("s3://b//photos/", "s3a://b/photos/store", False),
        ("s3://b", "s3://b/store", False), ("s3://b/store/photos", "s3://b/store", False),
        ("s3://b/photos", "s3://b/photos2", True), ("s3://b/photos", "gs://b/photos", True),
        ("s3://b/{{000..099}}.tar", "s3://b/store", True), ("{t}/photos", "s3://b/store", True),
        ("s3://b/{{000..099}}/*.tar", "s3://b/store", True), ("s3://b/{{000..099}}", "s3://b/042/store", False),
        ("{t}/photos/*", "{t}/photos/store", False), ("{t}/photos/*.png", "{t}/photos/store", True),
        ("{t}/photos/*.png", "{t}/photos", False), ("{t}/photos/*.jpg", "file://{t}/photos", True),
        ("{t}/*/*.png", "{t}/link/store/", True), ("{t}/**/*.png", "{t}/photos/store", False),
        ("{t}/photos/{{1,2}}.png", "{t}/photos", True), ("{t}/{{photos,link}}/[a-z]*", "{t}/link/store", False),
        ("s3://b/**/*.parquet", "s3://b/store", False), ("s3://b/[!s]*/*", "s3://b/store", True),
        ("{t}/[1]", "{t}/1", True), ("{t}/photos/**.jpg", "{t}/photos/store", True),
        ("{t}/photos/**.png", "{t}/photos", False), ("{t}/link/*", "{t}/photos/store", False),
        ("{t}/photos/*", "{t}/link/store", False), ("{t}/photos/*", "{t}/photos/.store", True),
        ("{t}/photos/.*", "{t}/photos/.store", False), ("s3a://b/*", "s3://b/store", False),
        ("s3://b/**.tar", "s3://b/store", True), ("{t}/*/x**/*", "{t}/photos/xy/store", False),
        ("{t}/{{" + "0123456789.tar," * 30 + "}}", "{t}/store", True),
        ("{t}/{{" + "0123456789.tar," * 30 + "photos}}/*", "{t}/photos/store", False),
        ("{t}/**/photos/*", "{t}/photos/store", False), ("{t}/photos/*", "{t}/store", True),
    ],
)  # fmt: skip
def test_images_and_results_are_kept_apart(tmp_path: Path, images: str, store: str, apart: bool) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    (tmp_path / "[1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    images, store = images.format(t=tmp_path), store.format(t=tmp_path)
    if apart:
        check_apart(images, "--store", store, ["a.png", "_ledger/a.parquet"])
    else:
        with pytest.raises(JobError, match=r"overlap|would include"):
            check_apart(images, "--store", store, ["a.png", "_ledger/a.parquet"])
