"""Photographs where the index refers to: the page reads the bytes that the job read."""

import base64
import io
import os
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from densefeat.page import create_app
from densefeat.page.references import PhotographMissing, References
from densefeat.storage.objects import Objects
from pipeline.images.listing.source import Source, list_images
from tests.densefeat.page.stores import photograph, replace_columns
from tests.helpers.datasets import read, tar_info, tar_of, write_tar
from tests.helpers.stores import FAILED_ROWS, ROWS, make_store

ADDRESS = "http://127.0.0.1:8000"
IMAGES = [photograph(row, "PNG" if row % 2 else "JPEG") for row in range(ROWS)]


def data_uri(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


COLUMNS: dict[str, list[Any]] = {
    "bytes": IMAGES,
    "base64": [base64.b64encode(data).decode() for data in IMAGES],
    "url-safe base64 in lines": [
        base64.encodebytes(data).decode().replace("+", "-").replace("/", "_") for data in IMAGES
    ],
    "data URIs": [data_uri(data) for data in IMAGES],
    "structs with bytes": [{"bytes": data, "path": f"{row}.jpg"} for row, data in enumerate(IMAGES)],
    "structs with paths": [{"bytes": None, "path": f"files/{row}.jpg"} for row in range(ROWS)],
    "paths": [f"files/{row}.jpg" for row in range(ROWS)],
}  # fmt: skip


def page_reads(source: Source) -> list[bytes]:
    references = References(source.kind, source.image_column)
    return [references.read(row) for row in source.references.to_pylist()]


@pytest.fixture(params=COLUMNS)
def parquet(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """Two files of several row groups."""
    (tmp_path / "files").mkdir()
    for row, data in enumerate(IMAGES):
        (tmp_path / "files" / f"{row}.jpg").write_bytes(data)
    table = pa.table({"image": COLUMNS[request.param], "id": range(ROWS)})
    pq.write_table(table.slice(0, 7), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(table.slice(7), tmp_path / "b.parquet", row_group_size=2)
    return list_images(str(tmp_path / "*.parquet"))


def test_rows_of_parquet_are_read_in_any_order(parquet: Source) -> None:
    assert page_reads(parquet) == read(parquet) == IMAGES
    references = References(parquet.kind, parquet.image_column)
    rows = parquet.references.to_pylist()
    for row in (10, 0, 9, 4, 3, 6, 2):
        assert references.read(rows[row]) == IMAGES[row]


def test_texts_of_a_dictionary_and_of_another_column(tmp_path: Path) -> None:
    text = pa.array([base64.b64encode(data).decode() for data in IMAGES]).dictionary_encode()
    pq.write_table(pa.table({"left.png": text}), tmp_path / "a.parquet")
    source = list_images(str(tmp_path), image_column="left.png")
    assert page_reads(source) == read(source) == IMAGES


def test_the_photographs_of_a_store_from_parquet(parquet: Source, tmp_path: Path) -> None:
    uri = str(tmp_path / "store")
    make_store(uri, source={"kind": "parquet", "image_column": "image"})
    replace_columns(uri, **{name: parquet.references[name] for name in ("key", "uri", "offset", "nbytes")})
    client = TestClient(create_app(uri), base_url=ADDRESS)
    for row in (row for row in range(ROWS) if row not in FAILED_ROWS):
        answer = client.get(f"/api/photograph/{row}?size=120")
        picture = Image.open(io.BytesIO(answer.content)).convert("RGB")
        assert np.abs(np.subtract(picture.getpixel((5, 5)), (20 * row, 100, 200 - 10 * row))).max() <= 4


def test_one_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, group_rows, groups = np.random.default_rng(0), 12, 5
    images = [rng.bytes(1 << 20) for _ in range(group_rows * groups)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=group_rows)
    taken: list[int] = []
    get_range = Objects.get_range

    def counted(self: Objects, key: str, start: int, end: int) -> bytes:
        taken.append(end - start)
        return get_range(self, key, start, end)

    monkeypatch.setattr(Objects, "get_range", counted)
    references, uri = References("parquet", "image"), str(tmp_path / "a.parquet")
    row = {"uri": uri, "nbytes": None}
    assert references.read({**row, "offset": 29}) == images[29]
    assert sum(taken) <= 17 << 20  # of 60: the end of the file, and the row group up to row 29
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda offset: references.read({**row, "offset": offset}), range(24, 36)))
    assert found == images[24:36]
    assert sum(taken) <= 25 << 20


def test_parquet_that_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [*IMAGES[:2], None]}), file)
    row = {"uri": str(file), "nbytes": None}
    references = References("parquet", "image")
    for offset, reason in ((2, "is null"), (3, "has 3 now")):
        with pytest.raises(PhotographMissing, match=reason):
            references.read({**row, "offset": offset})
    with pytest.raises(PhotographMissing, match="column 'jpg'"):
        References("parquet", "jpg").read({**row, "offset": 0})
    assert references.read({**row, "offset": 1}) == IMAGES[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(pa.ArrowInvalid):
        References("parquet", "image").read({**row, "offset": 0})
    file.unlink()
    with pytest.raises(FileNotFoundError):
        References("parquet", "image").read({**row, "offset": 0})


def test_members_of_tars(tmp_path: Path) -> None:
    members = [(tar_info(f"{row:03d}.jpg"), data) for row, data in enumerate(IMAGES)]
    link = tar_info("linked.jpg", tarfile.SYMTYPE, "003.jpg")
    tar = write_tar(tmp_path / "a.tar", [*members, (link, b""), (tar_info("broken.jpg", tarfile.SYMTYPE, "no"), b"")])
    source = list_images(str(tar))
    *rows, broken = source.references.to_pylist()
    references = References("tar")
    assert [references.read(row) for row in rows] == [*IMAGES, IMAGES[3]]
    with pytest.raises(PhotographMissing, match="link that leads nowhere"):
        references.read(broken)
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(PhotographMissing, match="the file has changed"):
        references.read(rows[5])


@pytest.mark.parametrize("options", [["gnu"], ["posix", "0.1"], ["posix", "1.0"]])
def test_sparse_members_of_tars(tmp_path: Path, options: list[str]) -> None:
    with (tmp_path / "hole.png").open("wb") as file:
        file.write(IMAGES[1])
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "plain.png").write_bytes(IMAGES[3])
    version = ["--sparse-version", options[1]] if len(options) == 2 else []
    command = ["tar", "-C", tmp_path, "--format", options[0], "--sparse", "--hole-detection=raw", *version]
    subprocess.run([*command, "-cf", tmp_path / "a.tar", "plain.png", "hole.png"], check=True)
    source = list_images(str(tmp_path / "a.tar"))
    assert source.references["nbytes"].null_count == 1
    assert page_reads(source) == read(source) == [IMAGES[3], (tmp_path / "hole.png").read_bytes()]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "caf\\xe9"  # a backslash of its own
    folder.mkdir()
    for number, name in enumerate((b"caf\xe9.jpg", rb"a\xe9.jpg", b'a b%2F#?\n"<i>.jpg')):
        (folder / os.fsdecode(name)).write_bytes(IMAGES[number])
    source = list_images(str(tmp_path))
    found = page_reads(source)
    assert found == read(source)
    assert sorted(found) == sorted(IMAGES[:3])


@pytest.mark.s3
def test_references_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": IMAGES}), tmp_path / "a.parquet", row_group_size=3)
    objects = Objects(f"{s3_bucket}/data")
    objects.put("a.parquet", (tmp_path / "a.parquet").read_bytes())
    objects.put("a.tar", tar_of({f"{row:03d}.jpg": data for row, data in enumerate(IMAGES)}))
    for name in ("a.parquet", "a.tar"):
        source = list_images(f"{s3_bucket}/data/{name}")
        assert page_reads(source) == IMAGES
    Objects(s3_bucket).put("data//x/1.jpg", IMAGES[0])
    row = {"uri": f"{s3_bucket}/data//x/1.jpg", "offset": None, "nbytes": None}
    assert References("folder").read(row) == IMAGES[0]
