"""Stores merged, without a backbone: every row is what it was, whoever is killed where, and whatever is refused."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densefeat import FeatureStore, StoreError, layout
from densefeat.conformance import problems
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import read_parquet
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.store.appending.growth import has_keys_of
from pipeline.store.converting.joining import joined
from pipeline.store.converting.merge import merge
from pipeline.store.layout import stored_attributes
from pipeline.store.verify import StoreCheck
from tests.helpers.killing import run_killed
from tests.helpers.stores import GUIDANCE, STEP, Kind, make_part

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FULL = Kind(compact=True, embedding=True)


def merged(stores: Sequence[Path], output: Path, *, resume: bool = False, threads: int = 3, **options: Any) -> int:
    whole = joined([str(store) for store in stores], str(output), **options)
    return merge(whole, Objects(output), resume=resume, threads=threads)


def guidance_chunks(store: Path) -> list[bytes | None]:
    """The chunks of all rows, as the objects have them."""
    opened, found = FeatureStore(store), list[bytes | None]()
    rows = opened.layout.shard_rows
    for shard in range(opened.layout.shards):
        data = Objects(store).get(layout.shard_key(shard, layout.GUIDANCE))
        places = layout.unpack_shard_index(data, rows, index_first=True)[: len(opened.layout.rows_of(shard))]
        found += [None if place is None else data[place[0] : sum(place)] for place in places]
    return found


def feature_chunks(store: Path) -> list[bytes | None]:
    opened = FeatureStore(store)
    there = set(opened.rows_with_features.tolist())
    return [opened.read_chunks([row])[0].features if row in there else None for row in range(len(opened))]


def check_merged(stores: Sequence[Path], output: Path, kind: Kind) -> FeatureStore:
    """That every row of the whole is that of its part, and that nothing is wrong with the whole."""
    whole, parts = FeatureStore(output), [FeatureStore(store) for store in stores]
    assert problems(whole) == []
    assert StoreCheck(str(output)).store() == []
    assert verify(VerifyConfig(store=str(output))) == 0
    assert len(whole) == sum(map(len, parts))
    assert feature_chunks(output) == [chunk for store in stores for chunk in feature_chunks(store)]
    kept = ["key", "uri", "offset", "nbytes", "status", "error", "height", "width", "affine", "valid_box"]
    rows = whole.index.select(kept).to_pylist()
    assert rows == [row for part in parts for row in part.index.select(kept).to_pylist()]
    labels = [part.class_names[label] if label is not None else None
              for part in parts for label in part.index["label"].to_pylist()]  # fmt: skip
    assert [None if at is None else whole.class_names[at] for at in whole.index["label"].to_pylist()] == labels
    if kind.compact:
        assert guidance_chunks(output) == [chunk for store in stores for chunk in guidance_chunks(store)]
        assert whole.compact == parts[0].compact
    if kind.embedding:
        values = [zarr.open_array(str(store / "embedding"), mode="r")[...] for store in (*stores, output)]
        assert values[-1].tobytes() == np.concatenate([np.asarray(value) for value in values[:-1]]).tobytes()
    arrays = [name for name in Objects(stores[0]).list() if name.startswith(("pca/", "step/", "upsampler/"))]
    assert len(arrays) > 4
    assert all((output / name).read_bytes() == (stores[0] / name).read_bytes() for name in arrays)
    assert has_keys_of(stored_attributes(whole.uri, whole.attributes), whole.index)
    clipped = [sum(read_parquet((store / layout.MANIFEST).read_bytes())["clipped"].to_pylist()) for store in stores]
    assert sum(read_parquet((output / layout.MANIFEST).read_bytes())["clipped"].to_pylist()) == sum(clipped)
    return whole


KINDS = [
    Kind(), Kind("float16"), Kind(embedding=True), FULL, Kind("float16", compact=True, embedding=True),
    Kind(fitted=True),
]  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    sizes=st.lists(st.tuples(st.integers(1, 11), st.integers(1, 5)), min_size=1, max_size=3),
    shard_rows=st.one_of(st.none(), st.integers(1, 9)),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_rows_are_what_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    kind: Kind,
    sizes: list[tuple[int, int]],
    shard_rows: int | None,
    threads: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("merged")
    stores = [folder / f"part{number}" for number in range(len(sizes))]
    names = [("a", "b", "c"), ("c", "d", "a"), ("e", "b", "f")]
    for number, (store, (rows, of_shard)) in enumerate(zip(stores, sizes, strict=True)):
        make_part(str(store), rows, of_shard, kind, seed + number, class_names=names[number])
    merged(stores, folder / "whole", shard_rows=shard_rows, threads=threads)
    whole = check_merged(stores, folder / "whole", kind)
    assert whole.layout.shard_rows == (shard_rows or sizes[0][1])
    assert whole.class_names == tuple(dict.fromkeys(name for part in names[: len(sizes)] for name in part))
    own = whole.attributes
    assert own["configuration"]["source"]["images"] == "/part0"
    assert [(one["images"], one["rows"]) for one in own.get("appended", [])] == [
        (f"/part{number}", sizes[number][0]) for number in range(1, len(sizes))
    ]
    shutil.rmtree(folder)


def two(folder: Path, kind: Kind = FULL, **options: Any) -> list[Path]:
    """Two stores, of shards of three and of four rows."""
    make_part(f"{folder}/a", 7, 3, kind, 1)
    make_part(f"{folder}/b", 9, 4, kind, 2, **options)
    return [folder / "a", folder / "b"]


def contents(store: Path) -> dict[str, Any]:
    """All objects of a store, but for seconds, processes and the claim's name."""
    found: dict[str, Any] = {}
    for key in Objects(store).list():
        data = (store / key).read_bytes()
        if key.startswith("_ledger/") or key == layout.MANIFEST:
            table = read_parquet(data)
            facts = (table.schema.metadata or {}).get(b"densefeat")
            own = {} if facts is None else json.loads(facts)
            found[key] = [
                table.drop_columns([name for name in ("seconds", "made_by") if name in table.column_names]).to_pylist(),
                {name: value for name, value in own.items() if name not in ("seconds", "made_by")},
            ]
        else:
            found[key] = data
    return found


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_operation(tmp_path: Path, every: int) -> None:
    """Continued, it makes the same bytes as at once; and until then readers see rows as they are, or pending."""
    stores, whole = two(tmp_path), tmp_path / "whole"
    shards = merged(stores, whole, shard_rows=5)
    expected = contents(whole)
    rows = feature_chunks(whole)
    number, reached_the_end = 0, False
    while not reached_the_end:
        output = tmp_path / f"{number}"
        reached_the_end = not run_killed(number, partial(merged, stores, output, shard_rows=5))
        if (output / "features/zarr.json").exists() and (output / "features/c").exists():
            found = feature_chunks(output)
            assert all(chunk in (None, rows[row]) for row, chunk in enumerate(found))
        merged(stores, output, shard_rows=5, resume=True)
        assert contents(output) == expected
        shutil.rmtree(output)
        number += every
    assert number > 6 * shards
    check_merged(stores, whole, FULL)


@pytest.mark.parametrize("array", [layout.FEATURES, layout.GUIDANCE, layout.EMBEDDING])
@pytest.mark.parametrize("damage", ["lost", "changed", "cut"])
def test_damage_is_not_copied(tmp_path: Path, array: str, damage: str) -> None:
    stores = two(tmp_path)
    objects, key = Objects(stores[1]), layout.shard_key(1, array)
    data = bytearray(objects.get(key))
    if damage == "changed":
        row = next(row for row in (4, 5, 6, 7) if feature_chunks(stores[1])[row])
        place = layout.shard_index_nbytes(4) + 20 if array == layout.GUIDANCE else 20
        assert row
        data[place] ^= 1
    if damage == "cut":
        del data[len(data) // 4 if array == layout.FEATURES else len(data) // 2 :]
    objects.delete(key) if damage == "lost" else objects.put(key, bytes(data))
    words = rf"{stores[1]}.*row [4-7].*jobs/verify_store.py --repair"
    with pytest.raises(StoreError, match=words):
        merged(stores, tmp_path / "whole", shard_rows=16)
    assert Objects(tmp_path / "whole").list(layout.LEDGER) == {}
    assert Objects(tmp_path / "whole").list("features/c") == {}


def test_what_cannot_be_in_one_store_is_refused_with_all_differences(tmp_path: Path) -> None:
    stores = two(tmp_path, Kind(embedding=True))
    make_part(str(tmp_path / "steps"), 3, 3, Kind(embedding=True), step=2 * STEP)
    make_part(str(tmp_path / "other"), 3, 3, Kind("float16", compact=True))
    with pytest.raises(JobError) as refused:
        merged([*stores, tmp_path / "steps", tmp_path / "other"], tmp_path / "whole")
    message = str(refused.value)
    lines = [line.split(": ")[:2] for line in message.splitlines()[1:-1]]
    assert [place.strip() for place, _ in lines] == [str(tmp_path / "steps")] + [str(tmp_path / "other")] * 7
    assert [name for _, name in lines] == [
        "step_sha256", "compact", "step_sha256", "storage.dtype", "storage.embedding", "storage.error_floor",
        "storage.guidance_quality", "storage.represent",
    ]  # fmt: skip
    assert 'storage.dtype: first "int8", this one "float16"' in message
    assert f"--like {stores[0]}" in message
    assert not (tmp_path / "whole").exists()


def test_places(tmp_path: Path) -> None:
    stores, whole = two(tmp_path), tmp_path / "whole"
    (tmp_path / "link").symlink_to(stores[0])
    for places, output in [
        ([stores[0], tmp_path / "link"], whole), (stores, stores[1]), (stores, stores[0] / "whole"), (stores, tmp_path),
    ]:  # fmt: skip
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(JobError, match=r"are the same place, or one is in the other: name each store once"):
            merged(places, output)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(StoreError, match=r"nowhere is not a feature store"):
        merged([*stores, tmp_path / "nowhere"], whole)
    whole.mkdir()
    (whole / "notes.txt").write_text("mine")
    with pytest.raises(JobError, match=r"is not empty \(notes.txt\): choose an empty location"):
        merged(stores, whole)
    (whole / "notes.txt").unlink()
    merged(stores, whole)
    with pytest.raises(JobError, match=r"there is a store at .*whole: choose another --output, or continue it"):
        merged(stores, whole)
    before = contents(whole)
    assert merged(stores, whole, resume=True) == 6
    assert contents(whole) == before
    with pytest.raises(JobError, match=r"is another one: source.images: stored"):
        merged(stores[::-1], whole, resume=True)
    make_part(str(tmp_path / "c"), 4, 3, FULL)
    with pytest.raises(JobError, match="is another one: it is made of other images, or in another order"):
        merged([*stores, tmp_path / "c"], whole, resume=True)
    with pytest.raises(JobError, match=r"is another one: storage.shard_images: stored 3, asked 4"):
        merged(stores, whole, shard_rows=4, resume=True)
    assert contents(whole) == before


def test_an_unfinished_store_and_one_of_another_version_are_refused(tmp_path: Path) -> None:
    stores = two(tmp_path)
    (stores[1] / layout.MANIFEST).unlink()
    with pytest.raises(JobError, match=rf"{stores[1]} is not finished: finish it first, with --resume"):
        merged(stores, tmp_path / "whole")
    root = stores[0] / layout.ATTRIBUTES
    root.write_text(root.read_text().replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(StoreError, match="version 9"):
        merged(stores, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_damaged_basis_is_refused(tmp_path: Path) -> None:
    stores = two(tmp_path)
    make_part(str(tmp_path / "c"), 3, 3, FULL)
    (stores[1] / "step/c/0").write_bytes((tmp_path / "c/pca/explained_variance_ratio/c/0").read_bytes())
    with pytest.raises((JobError, StoreError), match="step"):
        merged(stores, tmp_path / "whole")
    make_part(str(tmp_path / "d"), 3, 3, Kind(), step=3 * STEP)
    make_part(str(tmp_path / "e"), 3, 3, Kind())
    shutil.copy(tmp_path / "d/step/c/0", tmp_path / "e/step/c/0")
    with pytest.raises(JobError, match=r"the quantization steps in .*e do not match its attributes"):
        merged([tmp_path / "e"], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_keys_in_several_stores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stores = two(tmp_path, name="a")
    with pytest.raises(JobError, match=r"7 keys are in more than one store \(a/000.jpg, a/001.jpg, a/002.jpg …\)"):
        merged(stores, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    merged(stores, tmp_path / "whole", allow_duplicate_keys=True)
    assert "7 keys are in more than one store" in caplog.text
    whole = check_merged(stores, tmp_path / "whole", FULL)
    with pytest.raises(KeyError, match="several rows have the key"):
        whole.row_of("a/000.jpg")


def test_labels_that_cannot_be_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As for appended images: numbers and names cannot both be labels; a store without labels takes names."""
    kind, labels = Kind(), {"named": ("x", "y", "z"), "numbered": ()}
    for name, names in labels.items():
        make_part(str(tmp_path / name), 4, 2, kind, class_names=names)
    make_part(str(tmp_path / "without"), 2, 2, kind, class_names=(), labels=[None, None])

    def of(*names: str) -> tuple[tuple[str, ...], list[int | None]]:
        merged([tmp_path / name for name in names], tmp_path / "-".join(names))
        whole = FeatureStore(tmp_path / "-".join(names))
        return whole.class_names, whole.index["label"].to_pylist()

    assert of("without", "named") == (("x", "y", "z"), [None, None, 0, 1, 2, 0])
    assert of("without", "numbered") == ((), [None, None, 0, 1, 2, 0])
    assert of("named", "without") == (("x", "y", "z"), [0, 1, 2, 0, None, None])
    assert not caplog.records
    assert of("named", "numbered") == (("x", "y", "z"), [0, 1, 2, 0, *[None] * 4])
    assert "the labels of 4 rows of" in caplog.text
    assert "they are numbers" in caplog.text
    assert of("numbered", "named") == ((), [0, 1, 2, 0, *[None] * 4])
    assert "they have names of classes" in caplog.text
    assert of("without", "numbered", "named") == ((), [None, None, 0, 1, 2, 0, *[None] * 4])


def test_merged_stores_are_merged(tmp_path: Path) -> None:
    stores = two(tmp_path)
    make_part(str(tmp_path / "c"), 5, 2, FULL, 3)
    merged(stores[::-1], tmp_path / "ba")
    merged([tmp_path / "c", tmp_path / "ba"], tmp_path / "whole")
    whole = check_merged([tmp_path / "c", tmp_path / "b", tmp_path / "a"], tmp_path / "whole", FULL)
    assert [one["images"] for one in whole.attributes["appended"]] == ["/b", "/a"]
    assert whole.read_guidance(int(whole.rows_with_features[0])).shape == (*GUIDANCE, 3)


@pytest.mark.s3
def test_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    import s3fs

    stores = two(tmp_path)
    merged(stores, tmp_path / "whole")
    for store in stores:
        s3fs.S3FileSystem(skip_instance_cache=True).put(str(store), f"{s3_bucket}/{store.name}", recursive=True)
    places = [f"{s3_bucket}/{store.name}" for store in stores]
    whole = joined(places, f"{s3_bucket}/whole")
    merge(whole, Objects(f"{s3_bucket}/whole"), resume=False, threads=3)
    remote = Objects(f"{s3_bucket}/whole")
    local = Objects(tmp_path / "whole")
    same = [key for key in local.list() if not key.startswith("_") and key != layout.MANIFEST]
    assert remote.list().keys() == local.list().keys()
    assert all(remote.get(key) == local.get(key) for key in same)
    assert verify(VerifyConfig(store=f"{s3_bucket}/whole")) == 0


def test_no_space_is_said_before_a_row_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "other"):
        make_part(str(tmp_path / name), 9, 4, FULL)
    output = Objects(str(tmp_path / "merged"))
    whole = joined([str(tmp_path / "one"), str(tmp_path / "other")], output.uri)
    objects = [Objects(str(tmp_path / name)) for name in ("one", "other")]
    arrays = (layout.FEATURES, *layout.COMPANIONS)
    assert whole.nbytes == sum(sum(one.list(f"{array}/c").values()) for one in objects for array in arrays)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(whole.nbytes / 2)))
    with pytest.raises(JobError, match=r"no space for .*merged.*free some, and run the same command"):
        merge(whole, output, resume=False, threads=2)
    assert output.list() == {}
    monkeypatch.undo()
    merge(whole, output, resume=True, threads=2)
    assert StoreCheck(output.uri).store() == []
