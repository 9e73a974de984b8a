"""The command ``densefeat``."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from densefeat import FeatureStore, command_line
from densefeat.console import export
from densefeat.console.export import write_npz
from tests.helpers.stores import FAILED_ROWS, ROWS, H, K, KnownStore, W, make_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / "store"))


def exit_code(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        command_line.main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_script_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"densefeat": f"{command_line.__name__}:{command_line.main.__name__}"}


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from densefeat.command_line import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(*{'zarr', 'pyarrow', 'numpy', 'torch', 'fsspec'} & set(sys.modules), 'end')"
    )
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
        assert done.stdout.splitlines()[-1].strip() == "end"
    assert min(seconds) < 0.3


def test_info(known: KnownStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("info", known.uri) == 0
    text = capsys.readouterr().out
    for words in (f"{ROWS}: {ROWS - 2} with features", "2 corrupt, e.g. class/002.jpg: image file is truncated",
                  f"{K}×{H}×{W} int8", "80.0% explained", "name bilinear"):  # fmt: skip
        assert words in text
    assert exit_code("info", known.uri, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    store = FeatureStore(known.uri)
    assert facts["statuses"] == {"ok": ROWS - 2, "corrupt": 2}
    assert facts["nbytes"] == sum(filter(None, store.index["chunk_nbytes"].to_pylist()))
    assert facts["configuration"] == store.attributes["configuration"]


def test_export_to_numpy(known: KnownStore, tmp_path: Path) -> None:
    output, store = tmp_path / "x.npz", FeatureStore(known.uri)
    assert exit_code("export", known.uri, "--rows", 3, "9:11", -4, "--keys", "class/000.jpg", "--output", output) == 0
    with np.load(output) as exported:
        assert exported["row"].tolist() == [3, 9, 10, 7, 0]
        assert np.array_equal(exported["features"], store.read([3, 9, 10, 7, 0]))
        assert exported["key"].tolist() == [store.keys[row] for row in (3, 9, 10, 7, 0)]
        assert exported["label"].tolist() == [0, 0, 1, 1, 0]
        assert exported["valid_box"].tolist() == [[0, 0, H, W]] * 5
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("name", ["x.npz", "x.parquet"])
def test_export_to_a_full_disk(
    known: KnownStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        assert exit_code("export", known.uri, "--rows", "9:11", "--output", tmp_path / name) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(rf"error: --output {tmp_path / name} cannot be written: .*File too large", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_export_to_a_name_that_is_taken_meanwhile(
    known: KnownStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slowly(*arguments: Any) -> None:
        write_npz(*arguments)
        output.write_text("mine")

    output = tmp_path / "x.npz"
    monkeypatch.setattr(export, "write_npz", slowly)
    assert exit_code("export", known.uri, "--rows", "9:11", "--output", output) == 2
    assert "x.npz exists: delete it, or choose another name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.npz"]
    assert output.read_text() == "mine"


def test_export_of_pixels(known: KnownStore, tmp_path: Path) -> None:
    output, store = tmp_path / "pixels.parquet", FeatureStore(known.uri)
    assert exit_code("export", known.uri, "--rows", 3, 5, "--output", output) == 0
    table = pq.read_table(output)
    assert table.num_rows == 2 * H * W
    pixel = table.slice(H * W + 2 * W + 7, 1).to_pylist()[0]
    assert (pixel["row"], pixel["key"], pixel["y"], pixel["x"]) == (5, "class/005.jpg", 2, 7)
    features = [pixel[f"component_{i}"] for i in range(K)]
    assert np.array_equal(np.array(features, np.float32), store.read(5)[:, 2, 7])
    at = [[pixel["image_x"], pixel["image_y"]]]
    assert np.allclose(store.sample(5, at, coordinates="image")[0], features, atol=1e-5)


def test_what_is_refused(known: KnownStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken.npz"
    taken.write_bytes(b"kept")
    refused = {
        ("info", tmp_path): "not a feature store",
        ("export", known.uri, "--rows", 0, "--output", tmp_path / "x.csv"): "must end with .npz or .parquet",
        ("export", known.uri, "--rows", 0, "--output", taken): "exists",
        ("export", known.uri, "--rows", 0, "--output", tmp_path / "no" / "x.npz"): "does not exist",
        ("export", known.uri, "--output", tmp_path / "x.npz"): "--rows or --keys",
        ("export", known.uri, "--rows", ROWS, "--output", tmp_path / "x.npz"): f"row {ROWS} of a store",
        ("export", known.uri, "--rows", "a.jpg", "--output", tmp_path / "x.npz"): "--keys takes keys",
        ("export", known.uri, "--rows", "20:30", "--output", tmp_path / "x.npz"): "is empty",
        ("export", known.uri, "--keys", "a.jpg", "--output", tmp_path / "x.npz"): "no row has the key 'a.jpg'",
        ("export", known.uri, "--rows", FAILED_ROWS[0], "--output", tmp_path / "x.npz"): "image file is truncated",
    }
    for arguments, words in refused.items():
        assert exit_code(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
    assert taken.read_bytes() == b"kept"
    assert list(tmp_path.iterdir()) == [taken]


def test_browse(known: KnownStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "densefeat.page.app", None)
    assert exit_code("browse", known.uri) == 2
    assert "pip install 'densefeat[page]'" in capsys.readouterr().err
    served: list[Any] = []
    monkeypatch.setattr("densefeat.page.serve", lambda store, **options: served.append((store, options)))
    assert exit_code("browse", known.uri, "--images", "photos", "--port", 81, "--token", "x", "--texts", "t") == 0
    options = {"images": "photos", "texts": "t", "host": "127.0.0.1", "port": 81, "token": "x"}
    assert served == [(known.uri, options)]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("densefeat.page.serve", interrupted)
    assert exit_code("browse", known.uri) == 130


def test_browse_refuses_bad_options(known: KnownStore, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in ((("--port", 70000), "port must be"), (("--token", " "), "the token is empty")):
        assert exit_code("browse", known.uri, *options) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", [["densefeat.command_line", "browse"], ["densefeat.page"]])
def test_browse_serves_the_store(known: KnownStore, command: list[str]) -> None:
    arguments = [sys.executable, "-m", *command, known.uri, "--port", "0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            with urllib.request.urlopen(address, timeout=30) as answer:
                assert answer.status == 200
        finally:
            server.send_signal(signal.SIGINT)
    assert server.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_terminals_that_lack_characters(tmp_path: Path, encoding: str) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    make_store(str(tmp_path / "store"), source={"images": str(folder)})
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    for command in ("info", "card"):
        run = [sys.executable, "-m", "densefeat.command_line", command, str(tmp_path / "store")]
        done = subprocess.run(run, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
