"""Stores that the main job made apart, one like the other: merged, appended to, verified and repaired."""

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densefeat import FeatureStore, layout
from densefeat.command_line import main
from jobs.merge_stores import MergeConfig, merge
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from schemas.options import UpsampleConfig
from tests.helpers.photographs import photo
from tests.helpers.upsample_jobs import appending, chunks, config, names_of, some

ROOT = Path(__file__).parents[2]
OF_FIRST = 7
# Options of the first store; a store like it needs only those that have no default in it.
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"error_floor": 0.05},
    "float16 and embedding": {"dtype": "float16", "embedding": True},
    "compact": {"represent": "compact", "embedding": True},
}


def sources(photographs: Path, folder: Path) -> tuple[Path, Path, Path]:
    """Three folders of photographs; the second has a class more, and a broken file."""
    names = names_of(photographs)
    first = some(photographs, folder / "first", names[:OF_FIRST])
    second = some(photographs, folder / "second", [name for name in names[OF_FIRST:12] if name.startswith("b")])
    (second / "0").mkdir()
    shutil.copy(photographs / names[0], second / "0")
    (second / "b/90broken.jpg").write_bytes(photo()[:300])
    return first, second, some(photographs, folder / "third", names[12:])


def like(images: Path, store: Path, other: Path, **options: Any) -> UpsampleConfig:
    """A job that makes a store like another one, with its number of components and the size of its shards."""
    job = config(images, store, like=str(other), max_failed_share=0.5, **options)
    return replace(job, components=None, shard_images=None)


def merged(output: Path, *stores: Path, **options: Any) -> int:
    return merge(MergeConfig(stores=tuple(map(str, stores)), output=str(output), **options))


def strict(store: Path) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["info", str(store), "--strict"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_made_alike_merged_appended_and_repaired(
    photographs: Path, tmp_path: Path, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = VARIANTS[variant]
    first, second, third = sources(photographs, tmp_path)
    a, b, whole = tmp_path / "a", tmp_path / "b", tmp_path / "whole"
    assert upsample(config(first, a, **options)) == 0
    caplog.clear()
    omitted = {name: value for name, value in options.items() if name in ("dtype",)}
    assert upsample(like(second, b, a, **omitted)) == 0
    assert "PCA: fitting" not in caplog.text
    assert ("measured on these images, they would be" in caplog.text) is (variant != "float16 and embedding")
    one, other = FeatureStore(a), FeatureStore(b)
    for name in ["mean", "components", "explained_variance", "explained_variance_ratio"]:
        assert np.array_equal(one.array(f"pca/{name}", float), other.array(f"pca/{name}", float))
    assert (one.step is None and other.step is None) or np.array_equal(one.step, other.step)  # type: ignore[arg-type]

    assert merged(whole, a, b, shard_images=5) == 0
    assert verify(VerifyConfig(store=str(whole))) == 0
    strict(whole)
    opened = FeatureStore(whole)
    kept = [name for name in opened.index.column_names if name not in ("row", "label", "chunk_offset")]
    assert opened.index.select(kept).to_pylist() == [
        row for part in (one, other) for row in part.index.select(kept).to_pylist()
    ]
    assert opened.class_names == ("a", "b", "0")
    for key in other.keys:
        assert opened.class_names[opened.label(key) or 0] == key[0]
        if key.endswith(".png"):
            assert np.array_equal(opened.read(key), other.read(key))
            if opened.has_embedding:
                assert np.array_equal(opened.embedding(key), other.embedding(key))
    assert np.array_equal(opened.read(range(OF_FIRST)), one.read(range(OF_FIRST)))
    assert opened.index["status"].to_pylist().count("corrupt") == 1

    rows, before = len(opened), opened.index
    good = [row for row in range(rows) if before["status"][row].as_py() == "ok"]
    values = opened.read(good)
    job = replace(config(first, whole, max_failed_share=0.5, **options), shard_images=5)
    assert upsample(replace(appending(third, whole, max_failed_share=0.5, **options), shard_images=None)) == 0
    assert verify(VerifyConfig(store=str(whole))) == 0
    strict(whole)
    grown = FeatureStore(whole)
    assert [Path(one["images"]).name for one in grown.attributes["appended"]] == ["second", "third"]
    assert len(grown) == rows + 2
    assert np.array_equal(grown.read(good), values)

    last = chunks(whole, OF_FIRST)
    damaged = whole / layout.shard_key(1)  # rows of both stores
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (whole / layout.INDEX).write_bytes(b"lost")
    assert verify(VerifyConfig(store=str(whole), repair=True)) == 1
    assert upsample(replace(job, resume=True)) == 0
    assert verify(VerifyConfig(store=str(whole))) == 0
    assert chunks(whole, OF_FIRST) == last
    assert np.array_equal(FeatureStore(whole).read(good), values)
    assert FeatureStore(whole).index.equals(grown.index)


def test_stores_that_were_made_apart_are_refused_with_advice(photographs: Path, tmp_path: Path) -> None:
    first, second, _ = sources(photographs, tmp_path)
    a, b = tmp_path / "a", tmp_path / "b"
    assert upsample(config(first, a)) == 0
    assert upsample(config(second, b, pca=str(a), max_failed_share=0.5)) == 0
    with pytest.raises(JobError, match=rf"(?s)b: step_sha256: first .*--like {a}"):
        merged(tmp_path / "whole", a, b)
    assert not (tmp_path / "whole").exists()


def test_a_store_like_another_is_continued_only_like_it(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second, third = sources(photographs, tmp_path)
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert upsample(config(first, a)) == 0
    assert upsample(config(third, c)) == 0
    job = like(photographs, b, a)
    assert upsample(replace(job, dry_run=True)) == 0
    assert f"like        {a}: its basis, quantization steps" in caplog.text
    assert not b.exists()
    assert upsample(replace(job, dry_run=True, measure=True)) == 0
    assert upsample(replace(job, shards="1:")) == 0
    resumed = replace(job, resume=True)
    with pytest.raises(JobError, match=r"(?s)pca\.basis: stored .*storage\.steps: stored"):
        upsample(replace(resumed, like=str(c)))
    with pytest.raises(JobError, match=r"(?s)pca\.fitted_on_images: stored null.*storage\.steps: .* asked null"):
        upsample(replace(resumed, like=None))
    with pytest.raises(JobError, match=r"pca\.fitted_on_images"):
        upsample(replace(config(first, a, resume=True), like=str(c)))
    assert upsample(replace(resumed, like=str(b))) == 0  # its own basis and steps are those of the other
    storage = FeatureStore(b).attributes["configuration"]["storage"]
    assert storage["steps"] == FeatureStore(a).attributes["step_sha256"]
    assert "steps" not in FeatureStore(a).attributes["configuration"]["storage"]
    with pytest.raises(JobError, match="7 keys are in more than one store"):
        merged(tmp_path / "whole", a, b)
    assert merged(tmp_path / "whole", b, a, allow_duplicate_keys=True) == 0
    assert verify(VerifyConfig(store=str(tmp_path / "whole"))) == 0
    assert upsample(replace(resumed, store=str(tmp_path / "whole"))) == 0
    assert upsample(like(second, tmp_path / "d", tmp_path / "whole")) == 0


def test_what_is_not_alike_is_refused_before_work(photographs: Path, tmp_path: Path) -> None:
    first, second, _ = sources(photographs, tmp_path)
    a, b = tmp_path / "a", tmp_path / "b"
    assert upsample(config(first, a)) == 0
    for options, words in [
        ({"layer": "1"}, r"backbone\.layer: stored 2, asked 1"), ({"size": "96"}, r"geometry\.output_size"),
        ({"upsampler": "bilinear"}, r"upsampler\.name: stored \"jbu\", asked \"bilinear\""),
        ({"dtype": "float16"}, r"storage\.dtype: stored \"int8\""), ({"represent": "compact"}, "compact: stored null"),
        ({"embedding": True}, r"storage\.embedding"), ({"min_side": 9}, r"geometry\.min_side"),
        ({"quality": "balanced"}, r"storage\.represent"), ({"error_floor": 0.2}, r"storage\.error_floor"),
    ]:  # fmt: skip
        with pytest.raises(JobError, match=rf"(?s)--like .* has another configuration:.*{words}"):
            upsample(like(second, b, a, **options))
    for k, words in [(4, r"pca\.components: stored 8, asked 4"), (9, r"--components 9, but the store .* has 8")]:
        with pytest.raises(JobError, match=words):
            upsample(replace(like(second, b, a), components=k))
    with pytest.raises(JobError, match=r"--like .*nowhere cannot be read: .*is not a feature store"):
        upsample(like(second, b, tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=r"--like takes the basis of a store too: got --like .* and --pca .*omit --pca"
    ):
        like(second, b, a, pca=str(a))
    assert not b.exists()


def test_the_fit_of_an_upsampler_is_taken(photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second, _ = sources(photographs, tmp_path)
    a, b, whole = tmp_path / "a", tmp_path / "b", tmp_path / "whole"
    options: dict[str, Any] = {"upsampler": "multiview", "views": 3, "size": "48", "components": 4}
    assert upsample(config(first, a, **options)) == 0
    assert "multiview: fitting it to" in caplog.text
    caplog.clear()
    job = replace(like(second, b, a, upsampler="multiview", size="48"))
    assert upsample(replace(job, dry_run=True, measure=True)) == 0
    assert "its basis, quantization steps, the fit of multiview" in caplog.text
    assert upsample(job) == 0
    assert "fitting it" not in caplog.text
    assert upsample(replace(job, resume=True)) == 0
    assert merged(whole, a, b) == 0
    assert verify(VerifyConfig(store=str(whole))) == 0
    assert np.array_equal(FeatureStore(whole).array("upsampler/bias"), FeatureStore(a).array("upsampler/bias"))


def test_the_command(photographs: Path, tmp_path: Path) -> None:
    first, second, _ = sources(photographs, tmp_path)
    assert upsample(config(first, tmp_path / "a")) == 0
    assert upsample(like(second, tmp_path / "b", tmp_path / "a")) == 0

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs.merge_stores", *arguments],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip

    done = command("--stores", "a", "b", "--output", "whole", "--shard-images", "6")
    assert done.returncode == 0
    assert "whole: 12 rows in 2 shards, of 2 stores" in done.stderr
    again = command("--stores", "a", "b", "--output", "whole")
    assert again.returncode == 2
    assert "choose another --output, or continue it with --resume" in again.stderr
    none = command("--stores", "--output", "whole")
    assert none.returncode == 2
    assert "names the stores to merge: got none" in none.stderr
    assert verify(VerifyConfig(store=str(tmp_path / "whole"))) == 0


@pytest.mark.parametrize("option", [{"threads": 0}, {"shard_images": 0}, {"stores": ()}])
def test_options_out_of_range(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(option)).replace('_', '-')}"):
        MergeConfig(**{"stores": ("a",), "output": "b", **option})
