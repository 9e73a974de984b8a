import numpy as np
import numpy.typing as npt
import torch

from kernels.quantization import Encoding
from pipeline.store.calibration import choose_steps


def chosen(mean_square: npt.NDArray[np.float64], floor: float) -> npt.NDArray[np.float32]:
    steps = choose_steps("int8", mean_square, floor)
    assert steps is not None
    return steps


def test_float16_has_no_steps() -> None:
    assert choose_steps("float16", np.ones(2), 0.1) is None


def test_error_is_at_most_half_a_step() -> None:
    x = (
        torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))
        * torch.tensor([5.0, 2, 1, 0.1])[:, None, None]
    )
    step = torch.from_numpy(chosen(x.square().mean((0, 2, 3)).double().numpy(), 0.1))
    offset = torch.tensor([0.0, 1, -2, 0.01])
    codes, not_finite, clipped = Encoding(step).encode(x - offset[:, None, None], offset)
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert not_finite.tolist() == clipped.tolist() == [0, 0, 0]
    assert ((codes * step[:, None, None] - x).abs() <= step[:, None, None] * 0.5001).all()


def test_components_share_an_error_floor() -> None:
    rms = np.sqrt(101.0001 / 3)
    # The first is coarser than the floor by its own range, the others are at it.
    assert np.allclose(chosen(np.array([100.0, 1.0, 0.0001]), 0.05), [8 * 10 / 127, 0.05 * rms, 0.05 * rms])
    assert np.allclose(chosen(np.array([100.0, 1.0, 0.0001]), 0.25), [0.25 * rms] * 3)
    assert np.allclose(chosen(np.array([4.0, 1.0]), 0), [8 * 2 / 127, 8 / 127])
    assert (chosen(np.zeros(3), 0.1) > 0).all()
