"""``jobs/retire_rows.py``: rows named in any way are taken out of use and back; what cannot be done changes nothing."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from densefeat import FeatureStore, layout
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes, read_parquet
from jobs.retire_rows import RetireConfig, retire_rows
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.store.lease import Lease
from tests.helpers.servers.http_servers import serve
from tests.helpers.stores import FAILED_ROWS, ROWS, KnownStore, make_store

ROOT = Path(__file__).parents[2]
SOUND = [row for row in range(ROWS) if row not in FAILED_ROWS]


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    return make_store(str(tmp_path / "store"))


def in_use(known: KnownStore) -> list[int]:
    rows: list[int] = FeatureStore(known.uri).rows_with_features.tolist()
    return rows


def without(*rows: int) -> list[int]:
    return [row for row in SOUND if row not in rows]


def test_rows_and_keys_are_retired_and_taken_back(
    known: KnownStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    listed = tmp_path / "keys.txt"
    listed.write_text("class/009.jpg\nclass/010.jpg\n\n")
    config = RetireConfig(
        store=known.uri, rows=("0:2", "-4"), keys=("class/005.jpg",), keys_file=str(listed), reason="blurred"
    )
    assert retire_rows(config) == 0
    assert f"{known.uri}: rows retired: 6; retired already: 0" in caplog.text
    assert in_use(known) == without(0, 1, 7, 5, 9, 10)
    assert retire_rows(RetireConfig(store=known.uri, rows=("5", "6"), reason="dark")) == 0
    assert f"{known.uri}: rows retired: 1; retired already: 1" in caplog.text
    assert FeatureStore(known.uri).index["error"].to_pylist()[5:7] == ["blurred", "dark"]
    assert retire_rows(RetireConfig(store=known.uri, rows=("4:7",), restore=True)) == 0
    assert f"{known.uri}: taken back into use: 2 of 3 rows" in caplog.text
    assert in_use(known) == without(0, 1, 7, 9, 10)
    assert verify(VerifyConfig(store=known.uri)) == 0
    assert retire_rows(RetireConfig(store=known.uri, restore_all=True)) == 0
    assert in_use(known) == SOUND
    assert not (Path(known.uri) / layout.JOBS).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keys": ("class/005.jpg", "nothing.jpg")},
            "does not have 1 of the 2 keys: 'nothing.jpg'. Nothing",
        ),
        ({"rows": (str(ROWS),)}, rf"row {ROWS} of a store with {ROWS} rows"),
        ({"rows": ("class/005.jpg",)}, "--rows takes numbers and ranges"),
        ({"rows": ("5", "20:30")}, "--rows 20:30 is empty"),
        ({"keys_file": "/nothing/here.txt"}, "--keys-file /nothing/here.txt: .* does not exist. Check the spelling"),
        ({"keys_file": "/dev/null"}, "has no keys"),
    ],
)
def test_rows_that_the_store_does_not_have(known: KnownStore, options: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        retire_rows(RetireConfig(store=known.uri, reason="blurred", **options))  # type: ignore[arg-type]
    assert in_use(known) == SOUND


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no rows were named"),
        ({"rows": ("1",)}, "--reason is missing"),
        ({"rows": ("1",), "reason": " "}, "--reason is missing"),
        ({"rows": ("1",), "reason": "two\nlines"}, "--reason must be one line of text"),
        ({"rows": ("1",), "reason": "blurred", "restore": True}, "--reason is for rows that are retired"),
        ({"rows": ("1",), "restore_all": True}, "pass --restore for some of them"),
        ({"restore": True, "restore_all": True}, "exclude each other"),
        ({"restore": True}, "no rows were named"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetireConfig(store="store", **options)  # type: ignore[arg-type]


def test_a_list_of_keys_for_several_stores(
    known: KnownStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    listed = tmp_path / "keys.txt"
    listed.write_bytes("\ufeffclass/009.jpg\r\nelse\u2028where.jpg\r\n\r\nclass/010.jpg".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RetireConfig(store=known.uri, keys_file="~/keys.txt", reason="withdrawn")
    with pytest.raises(JobError, match=r"does not have 1 of the 3 keys: 'else\\u2028where.jpg'.*--ignore-unknown"):
        retire_rows(config)
    assert in_use(known) == SOUND
    assert retire_rows(replace(config, ignore_unknown=True)) == 0
    assert "keys that it does not have: 1 of 3" in caplog.text
    assert in_use(known) == without(9, 10)


def test_a_key_of_several_rows_stands_for_all(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    index = read_parquet(objects.get(layout.INDEX))
    keys = index["key"].to_pylist()
    keys[6] = keys[5]
    number = index.schema.get_field_index("key")
    objects.put(layout.INDEX, parquet_bytes(index.set_column(number, index.schema.field(number), [keys])))
    retire_rows(RetireConfig(store=known.uri, keys=(keys[5],), reason="withdrawn"))
    assert in_use(known) == without(5, 6)


def test_a_web_server_can_only_be_read(known: KnownStore) -> None:
    with serve(known.uri) as server, pytest.raises(JobError, match="a web server can only be read"):
        retire_rows(RetireConfig(store=server.uri, rows=("5",), reason="blurred"))
    assert in_use(known) == SOUND


def test_refused_while_a_job_is_writing(known: KnownStore) -> None:
    with Lease(Objects(known.uri), range(1)), pytest.raises(JobError, match="another job is at work"):
        retire_rows(RetireConfig(store=known.uri, rows=("5",), reason="blurred"))
    assert in_use(known) == SOUND


def test_as_a_command(known: KnownStore) -> None:
    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "jobs.retire_rows", "--store", known.uri, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    refused = run("--rows", "5")
    assert refused.returncode == 2
    assert "--reason is missing" in refused.stderr
    done = run("--rows", "5", "0:2", "--keys", "class/006.jpg", "--reason", "consent withdrawn")
    assert done.returncode == 0, done.stderr
    assert in_use(known) == without(0, 1, 5, 6)
    info = subprocess.run(
        [sys.executable, "-m", "densefeat.command_line", "info", known.uri], cwd=ROOT, capture_output=True, text=True
    )
    assert "4 retired, e.g. class/000.jpg: consent withdrawn" in info.stdout
