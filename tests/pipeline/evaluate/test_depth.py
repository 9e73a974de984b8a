"""The depth task: labels in metres, figures by hand, and a store of which the right answer is known."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import JobError
from pipeline.evaluate.data.labels import DepthFolder
from pipeline.evaluate.depth import delta1, depth_counts, evaluate, rmse
from pipeline.evaluate.report.result import Result
from tests.pipeline.evaluate.stores import compared, config, store_of, write_png

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
SIDE = 16


def test_figures_by_hand() -> None:
    truth = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    predicted = torch.tensor([1.2, 1.5, 4.0, 8.0], dtype=torch.float64)
    counts = depth_counts(predicted, truth)[None]
    assert float(rmse(counts)) == pytest.approx(((0.04 + 0.25 + 0 + 9) / 4) ** 0.5)
    assert float(delta1(counts)) == 0.5  # 1.2 and 1; 1.333 and 1.6 are not below 1.25


def test_depths_in_metres(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.array([[0, 500, 2000, 20000]], np.uint16))
    np.save(tmp_path / "b.jpg.npy", np.array([[0.5, np.nan, np.inf, 3.0]]))
    write_png(tmp_path / "c.png", np.zeros((2, 2, 3), np.uint8))
    folder = DepthFolder(str(tmp_path), 0.001, (0.1, 10.0))
    np.testing.assert_array_equal(folder("a.jpg"), [[np.nan, 0.5, 2.0, np.nan]])
    metres = DepthFolder(str(tmp_path), None, (0.1, 10.0))
    np.testing.assert_array_equal(metres("b.jpg"), [[0.5, np.nan, np.nan, 3.0]])
    with pytest.raises(JobError, match="has integer depths: pass --depth-scale"):
        metres("a.jpg")
    with pytest.raises(ValueError, match=r"c.png is no depth image: got mode RGB, expected grey"):
        metres("c.jpg")
    with pytest.raises(FileNotFoundError, match=r"no depth for 'd.jpg': expected d.jpg.npy or d.jpg.png or d.npy"):
        metres("d.jpg")
    # A scale is for integers: floats are metres already.
    np.testing.assert_array_equal(folder("b.jpg"), [[0.5, np.nan, np.nan, 3.0]])
    np.save(tmp_path / "e.npy", np.array([[500, 4000]], np.int32))
    np.testing.assert_array_equal(folder("e.jpg"), [[0.5, 4.0]])


def header(shape: tuple[int, ...]) -> bytes:
    """Of an array that is not there."""
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.npy", b""),
        ("a.npy", b"PK\x03\x04 and no more"),
        ("a.npy", b"\x93NUMPY\x01\x00"),
        ("a.npy", b"no array"),
        ("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8\xff\xfe{{{".ljust(128)),
        ("a.npy", header((10**9, 10**9))),
        ("a.png", b""),
        ("a.png", b"\xff\xd8\xff\xe0 a JPEG"),
        ("a.png", b"\x89PNG\r\n\x1a\n\x00\x00"),
    ],
)
def test_damaged_depths_are_said_by_name(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^{name} is no depth image: ") as said:
        DepthFolder(str(tmp_path), 0.1, (0.1, 10.0))("a.jpg")
    assert " at 0x" not in str(said.value)


def test_every_cut_of_a_depth_file_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", np.linspace(1, 2, 12).reshape(3, 4))
    whole = (tmp_path / "whole.npy").read_bytes()
    folder = DepthFolder(str(tmp_path), None, (0.1, 10.0))
    for size in range(len(whole)):
        (tmp_path / "a.npy").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^a.npy is no depth image"):
            folder("a.jpg")


def test_features_that_hold_the_depth_predict_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    held, noise = {}, {}
    for part in ("train", "val"):
        (tmp_path / "depth" / part).mkdir(parents=True)
        for i in range(4):
            depth = rng.uniform(1, 5, (SIDE, SIDE))
            depth[0] = 0  # unknown
            np.save(tmp_path / "depth" / part / f"{i}.npy", depth)
            held[f"{part}/{i}.jpg"] = np.stack([2 * depth - 3, rng.normal(size=depth.shape)])
            noise[f"{part}/{i}.jpg"] = rng.normal(size=(2, SIDE, SIDE))
    comparison = compared(noise=store_of(tmp_path / "a", noise), held=store_of(tmp_path / "b", held))
    outcome = evaluate(comparison, config("depth", tmp_path / "depth", tmp_path / "report"))
    result = Result.of("depth", outcome, comparison)
    assert outcome.figures[0].counts["held"][..., 2].unique().tolist() == [SIDE * (SIDE - 1)]
    assert result.estimates["RMSE"]["held"][0].mean < 0.01
    assert result.estimates["δ1"]["held"][0].mean == 1
    # Noise predicts the mean of depths that are uniform in 1 … 5.
    assert result.estimates["RMSE"]["noise"][0].mean == pytest.approx(4 / 12**0.5, rel=0.05)
    assert result.estimates["RMSE"]["held"][1].high < 0
