import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kernels.dispatch import IMPLEMENTATIONS
from kernels.multiview import ViewMatrices, batched, smooth, solve
from kernels.multiview.reference import edge_weights
from kernels.multiview.views import Bands
from pipeline.upsamplers.multiview.views import MOST_VIEWS, held_out_views, solver_grid, solver_views, view_operators
from tests.helpers.rounding import assert_close

OPTIONS = {"regularisation": 0.5, "iterations": 6}


def problem(size=(40, 56), low=(5, 7), stride=2, views=5, B=2, k=11, dtype=torch.float32):
    grid = solver_grid(size, stride)
    operators = view_operators(solver_views(size, views), low, grid, 3.0).to(dtype=dtype)
    guidance = F.interpolate(torch.rand(B, 3, 5, 4, dtype=dtype), grid)
    return torch.randn(B, views, k, *low, dtype=dtype), operators, guidance, torch.randn(B, k, *grid, dtype=dtype)


def jittered(maps, view):
    """As FeatUp does it: padded, enlarged, cropped, flipped."""
    (H, W), p = view.size, view.pad_px
    maps = F.pad(maps[None], (p, p, p, p), mode="reflect")
    if view.zoom > 1:
        maps = F.interpolate(
            maps, scale_factor=view.zoom, mode="bilinear", align_corners=False, recompute_scale_factor=False
        )
    maps = maps[0, :, view.row_px : view.row_px + H, view.column_px : view.column_px + W]
    return maps.flip(2) if view.flip else maps


def pooled(maps, low, sigma):
    output = maps.new_empty(len(maps), *low)
    y, x = (torch.arange(n, dtype=maps.dtype) + 0.5 for n in maps.shape[1:])
    for i in range(low[0]):
        for j in range(low[1]):
            down = (y - (i + 0.5) * len(y) / low[0])[:, None]
            right = x - (j + 0.5) * len(x) / low[1]
            weights = torch.exp(-(down**2 + right**2) / (2 * sigma**2))
            output[:, i, j] = (maps * weights).sum((1, 2)) / weights.sum()
    return output


@pytest.mark.parametrize(
    ("size", "low", "stride"), [((40, 56), (5, 7), 1), ((45, 30), (4, 3), 2), ((64, 64), (4, 4), 3)]
)
def test_operators_are_views_pooled(size, low, stride):
    grid, views = solver_grid(size, stride), [*solver_views(size, 6), *held_out_views(size, 2)]
    assert grid == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    maps = torch.randn(3, *grid, dtype=torch.float64)
    seen = view_operators(views, low, grid, 2.5).to(dtype=torch.float64).project(maps[None])[0]
    pixels = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    for view, actual in zip(views, seen, strict=True):
        expected = pooled(jittered(pixels, view), low, 2.5)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)  # weights below 1e-5 are left out


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (9, 300)])
def test_the_sequence_of_views(size):
    views = solver_views(size, 41)
    assert views[:9] == solver_views(size, 9)
    image = torch.rand(1, *size, dtype=torch.float64)
    assert torch.equal(jittered(image, views[0]), image)
    assert not set(held_out_views(size, 20)) & set(solver_views(size, MOST_VIEWS))
    assert 0.4 < sum(view.flip for view in views) / 41 < 0.6
    assert 0.4 < sum(view.zoom > 1 for view in views) / 41 < 0.6
    for count in (1, MOST_VIEWS + 1):
        with pytest.raises(ValueError, match="count"):
            solver_views(size, count)


def test_bands_are_the_matrix():
    operators = problem((96, 64), (6, 4), views=9)[1]
    matrix = operators.rows.flatten(0, 1)
    bands, x = Bands.of(matrix), torch.randn(matrix.shape[1], 4)
    products = torch.cat([band.matrix @ x[slice(*band.support)] for band in bands.bands])
    assert_close(products[bands.place], matrix @ x, 2e-6, size=matrix.abs() @ x.abs())
    assert torch.equal(bands.place[bands.order], torch.arange(len(matrix)))
    assert sum(band.matrix.numel() for band in bands.bands) < 0.8 * matrix.numel()
    assert not ((matrix != 0) & (matrix.abs() < 1e-8)).any()  # no denormals


@pytest.mark.parametrize(
    ("implementation", "dtype", "rtol"),
    [("reference", torch.float64, 1e-8), ("batched", torch.float64, 1e-8), ("cpu", None, 1e-3)],
)
def test_the_solution_is_that_of_dense_least_squares(implementation, dtype, rtol):
    targets, views, guidance, start = problem((12, 10), (3, 2), 1, 4, B=1, k=3, dtype=torch.float64)
    (H, W), n = views.high, 120
    A = torch.einsum("vip,vjq->vijpq", views.rows, views.columns).reshape(-1, n)
    laplacian = torch.zeros(n, n, dtype=torch.float64)
    for edges, (down, right) in zip(edge_weights(guidance[0], 0.3), ((0, 1), (1, 0), (1, 1), (1, -1)), strict=True):
        for y in range(H - down):
            for x in range(max(0, -right), W - max(0, right)):
                difference = torch.zeros(n, dtype=torch.float64)
                difference[y * W + x], difference[(y + down) * W + x + right] = 1, -1
                laplacian += edges[y, x] * torch.outer(difference, difference)
    y = targets[0].transpose(0, 1).flatten(1)  # [k, V h w]
    expected = torch.linalg.solve(A.T @ A + 0.5 * laplacian, A.T @ y.T).T.reshape(3, H, W)
    dtype = dtype or torch.float32
    arguments = (targets.to(dtype), views.to(dtype=dtype), guidance.to(dtype), start.to(dtype))
    options = {"regularisation": 0.5, "iterations": 400, "colour_sigma": 0.3, "tolerance": 1e-12}
    solution = solve(*arguments, implementation=implementation, **options)
    assert_close(solution.features[0], expected, rtol)
    objective = (A @ expected.flatten(1).T - y.T).square().sum()
    objective += 0.5 * torch.einsum("kn,nm,km->", expected.flatten(1), laplacian, expected.flatten(1))
    assert_close(solution.final[0], objective, rtol, size=objective)  # of squares
    assert solution.final < solution.initial


@pytest.mark.parametrize(
    ("size", "low", "stride", "views", "k"),
    [((40, 56), (5, 7), 2, 5, 11), ((30, 30), (2, 2), 1, 2, 1), ((64, 48), (8, 6), 4, 9, 16)],
)
@pytest.mark.parametrize(("implementation", "group"), [("cpu", 1), ("batched", 1), ("batched", 2), ("batched", 4)])
def test_fast_is_reference(size, low, stride, views, k, implementation, group, monkeypatch):
    monkeypatch.setattr(batched, "_IMAGES", {"cpu": group})
    arguments = problem(size, low, stride, views, B=3, k=k)
    start = arguments[3].clone()
    fast, reference = (solve(*arguments, implementation=name, **OPTIONS) for name in (implementation, "reference"))
    assert torch.equal(arguments[3], start)
    for actual, expected in zip(fast, reference, strict=True):
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, 2e-5, size=expected.abs().max())  # those that are few are sums of squares


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["multiview"])
def test_images_do_not_depend_on_their_batch_nor_on_threads(implementation):
    targets, views, guidance, start = problem(B=3)
    together = solve(targets, views, guidance, start, implementation=implementation, **OPTIONS)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))  # another number of them
    try:
        for i in (2, 0):
            some = slice(i, i + 1)
            alone = solve(targets[some], views, guidance[some], start[some], implementation=implementation, **OPTIONS)
            if implementation == "cpu":
                assert all(torch.equal(a[some], b) for a, b in zip(together, alone, strict=True))
            else:
                assert_close(together.features[some], alone.features, 1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["multiview"])
def test_what_is_not_finite_stays_in_its_channel(implementation):
    targets, views, guidance, start = problem()
    targets[1, 2, 3, 0, 0] = torch.nan
    solution = solve(targets, views, guidance, start, implementation=implementation, **OPTIONS)
    assert solution.features[0].isfinite().all()
    assert solution.final.isfinite().tolist() == [True, False]
    assert solution.iterations[1].tolist() == [0 if k == 3 else 6 for k in range(11)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["multiview"])
def test_a_channel_that_is_done_stops(implementation):
    targets, views, guidance, start = problem(k=2)
    targets[:, :, 1], start[:, 1] = 3.0, 3.0  # a constant is seen as itself
    options = {**OPTIONS, "tolerance": 1e-3}
    solution = solve(targets, views, guidance, start, implementation=implementation, **options)
    torch.testing.assert_close(solution.features[:, 1], start[:, 1], rtol=0, atol=1e-3)
    zeros = solve(0 * targets, views, guidance, 0 * start, implementation=implementation, **OPTIONS)
    assert not zeros.iterations.any()
    assert not zeros.features.any()


@pytest.mark.parametrize(
    ("implementation", "dtype", "rtol"),
    [("reference", torch.float64, 1e-8), ("batched", torch.float64, 1e-8), ("cpu", torch.float32, 1e-4)],
)
def test_smoothing_is_the_weighted_least_squares_filter(implementation, dtype, rtol):
    H, W, strength = 7, 5, 3.0
    features, guidance = torch.randn(2, 3, H, W, dtype=dtype), torch.rand(2, 3, H, W, dtype=dtype)
    before = features.clone()
    options = {"strength": strength, "iterations": 200, "colour_sigma": 0.4, "tolerance": 1e-12}
    smoothed = smooth(features, guidance, implementation=implementation, **options).features
    assert torch.equal(features, before)
    for image in range(2):
        matrix = torch.eye(H * W, dtype=torch.float64)
        for y, x in itertools.product(range(H), range(W)):
            for down, right in itertools.product((-1, 0, 1), (-1, 0, 1)):
                other = (y + down, x + right)
                if (down, right) == (0, 0) or not (0 <= other[0] < H and 0 <= other[1] < W):
                    continue
                distance = (guidance[image, :, y, x] - guidance[image, :, *other]).double().square().sum()
                weight = strength * torch.exp(-distance / (2 * 0.4**2)) / (down**2 + right**2)
                matrix[y * W + x, y * W + x] += weight
                matrix[y * W + x, other[0] * W + other[1]] -= weight
        expected = torch.linalg.solve(matrix, features[image].flatten(1).T.double()).T.view(3, H, W)
        assert_close(smoothed[image], expected, rtol)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["multiview"])
def test_smoothing_keeps_constants_and_does_nothing_without_strength(implementation):
    features, guidance = torch.randn(3, 9, 10, 12), torch.rand(3, 3, 10, 12) / 50
    same = smooth(features, guidance, strength=0, implementation=implementation)
    assert torch.equal(same.features, features)
    assert not same.iterations.any()
    features[1] = 2.5
    smoothed = smooth(features, guidance, strength=20.0, iterations=5, implementation=implementation)
    assert_close(smoothed.features[1], features[1], 1e-6)
    assert (smoothed.final[[0, 2]] < smoothed.initial[[0, 2]]).all()
    assert smoothed.features[0].std() < 0.7 * features[0].std()
    for arguments, words in [((features[0], guidance), "features"), ((features, guidance[:2]), "guidance")]:
        with pytest.raises(ValueError, match=words):
            smooth(*arguments, strength=1.0, implementation=implementation)
    with pytest.raises(ValueError, match="strength: got -1"):
        smooth(features, guidance, strength=-1, implementation=implementation)


def test_bad_arguments_are_named():
    targets, views, guidance, start = problem()
    for arguments, options, words in [
        ((targets[0], views, guidance, start), {}, "targets"),
        ((targets[:, :3], views, guidance, start), {}, "views"),
        ((targets.double(), views, guidance, start), {}, "views"),
        ((targets, views, guidance[:, :2], start), {}, "guidance"),
        ((targets, views, guidance, start[..., :3]), {}, "start"),
        ((targets, views, guidance, start), {"regularisation": -1}, "regularisation"),
        ((targets, views, guidance, start), {"iterations": 0}, "iterations"),
        ((targets, views, guidance, start), {"colour_sigma": 0}, "colour_sigma"),
        ((targets, views, guidance, start), {"implementation": "gpu"}, "implementation"),
    ]:
        with pytest.raises(ValueError, match=words):
            solve(*arguments, **{**OPTIONS, **options})
    with pytest.raises(ValueError, match="rows"):
        ViewMatrices(torch.zeros(2, 3), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="columns"):
        ViewMatrices(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("B", [3, 11])
def test_a_gpu_is_as_precise_and_does_not_depend_on_the_batch(B):
    arguments = problem(B=B)
    expected = solve(*arguments, **OPTIONS)
    there = tuple(argument.to("cuda") for argument in arguments)
    together = solve(*there, **OPTIONS)
    torch.testing.assert_close(together.features.cpu(), expected.features, rtol=0, atol=1e-4)
    alone = solve(there[0][1:2], there[1], there[2][1:2], there[3][1:2], **OPTIONS)
    assert torch.equal(alone.features[0], together.features[1])
