"""Numba's vector language by itself, against numpy: tiles, memory, functions, threads."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.compilation import compiled
from kernels.simd.functions import TINY, exp2, gelu, without_denormals
from kernels.simd.memory import (
    lanes,
    load,
    load_rows,
    load_tile,
    load_window,
    splat,
    splats,
    store,
    store_part,
    store_tile,
    zeros,
)
from kernels.simd.threads import _pool, in_threads, row_jobs
from kernels.simd.tiles import VECTOR_BYTES, fma, maximum, rows_of, summed_products, swapped_pairs, width

DTYPES = [np.float32, np.float64]


def lanes_of(dtype):
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def numbers(*shape, dtype):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


# --- Tiles and memory ---


@compiled
def arithmetic(a, b, row, output):
    """Of tiles of 3 × 2 vectors and a row of 1 × 2, which broadcasts; five results one after the other."""
    L = lanes(a)
    x, y = load_tile(a, (0, 0), 3, 2, 2 * L, L), load_tile(b, (0, 0), 3, 2, 2 * L, L)
    z = load_tile(row, (0, 0), 1, 2, 0, L)
    store_tile(output, (0, 0, 0), x + y, 2 * L, L)
    store_tile(output, (1, 0, 0), x - z, 2 * L, L)
    store_tile(output, (2, 0, 0), z * y, 2 * L, L)
    store_tile(output, (3, 0, 0), 2.0 / x, 2 * L, L)
    store_tile(output, (4, 0, 0), maximum(x, z), 2 * L, L)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_broadcasts_as_numpys(dtype):
    L = lanes_of(dtype)
    a, b, row = (
        numbers(3, 2 * L, dtype=dtype),
        numbers(4, 2 * L, dtype=dtype)[1:].copy(),
        numbers(1, 2 * L, dtype=dtype),
    )
    output = np.empty((5, 3, 2 * L), dtype)
    arithmetic(a, b, row, output)
    for got, expected in zip(output, (a + b, a - row, row * b, 2 / a, np.maximum(a, row)), strict=True):
        np.testing.assert_array_equal(got, expected)


@compiled
def product(weights, inputs, output):
    """weights [K, 3] and inputs [K, 2·L] -> weightsᵀ · inputs, as the docstring of `kernels.simd.tiles` has it."""
    L = lanes(inputs)
    sums = zeros(inputs, 3, 2)
    for k in range(weights.shape[0]):
        sums = fma(splats(weights, (k, 0), sums), load_tile(inputs, (k, 0), 1, 2, 0, L), sums)
    store_tile(output, (0, 0), sums, 2 * L, L)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_product(dtype):
    weights, inputs = numbers(9, 3, dtype=dtype), numbers(9, 2 * lanes_of(dtype), dtype=dtype)
    output = np.empty((3, inputs.shape[1]), dtype)
    product(weights, inputs, output)
    np.testing.assert_allclose(output, weights.T @ inputs, rtol=0, atol=20 * np.finfo(dtype).eps)


@compiled
def moved(source, output):
    """Loads of all kinds, each to a row of the output, or two."""
    L = lanes(source)
    store(output, (0, 0), load(source, (1, 3)))  # begins anywhere
    store(output, (1, 0), splat(source, (2, 5)))
    like = zeros(source, 3, 1)
    store_tile(output, (2, 0), load_window(source, (0, 1), like), 2 * L, 0)
    tile = load_rows(source, (0, 2), zeros(source, 2, 2), 4 * L)
    store_tile(output, (5, 0), tile, 2 * L, L)
    store_tile(output, (7, 0), rows_of(tile, 1, 1), 0, L)
    store_tile(output, (8, 0), swapped_pairs(tile), 2 * L, L)
    store(output, (10, 0), summed_products(load_rows(source, (0, 0), like, 4 * L), like + 2.0, zeros(source, 1, 1)))
    store_part(output, (11, 0), load(source, (1, 0)), 3)
    output[12, 0] = width(tile)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loads_and_stores(dtype):
    L = lanes_of(dtype)
    if L < 4:
        pytest.skip("vectors of this processor hold fewer than three numbers of this dtype")
    source, untouched = numbers(3, 4 * L, dtype=dtype), 99
    output = np.full((13, 2 * L), untouched, dtype)
    moved(source, output)
    tile = source[:2, 2 : 2 + 2 * L]
    pairs = [np.stack([row[:L].reshape(-1, 2), row[L:].reshape(-1, 2)], 1).ravel() for row in tile]
    expected = np.full_like(output, untouched)
    expected[0, :L], expected[1, :L] = source[1, 3 : 3 + L], source[2, 5]
    for row in range(3):
        expected[2 + row, :L] = source[0, 1 + row : 1 + row + L]
    expected[5:7], expected[7], expected[8:10] = tile, tile[1], pairs
    expected[10, :L] = 2 * source[0, :L] + 2 * source[1, :L] + 2 * source[2, :L]
    expected[11, :3], expected[12, 0] = source[1, :3], 2 * L
    np.testing.assert_allclose(output, expected, rtol=0, atol=8 * np.finfo(dtype).eps)


# --- Functions ---


@compiled
def exp2_and_gelu(x, output):
    for k in range(0, x.size, lanes(x)):
        store(output, (0, k), exp2(load(x, (k,))))
        store(output, (1, k), gelu(load(x, (k,))))


def test_functions_of_float32():
    x = np.linspace(-130, 127, 64_000, dtype=np.float32)
    x[:16] = math.nan
    output = np.empty((2, x.size), np.float32)
    exp2_and_gelu(x, output)
    assert np.isnan(output[:, :16]).all()
    wide, (powers, gelus) = torch.from_numpy(x[16:]).double(), torch.from_numpy(output[:, 16:]).double()
    expected = torch.exp2(wide) * (wide >= -64)
    two_roundings = 2 * 2.0**-23  # one where the processor multiplies and adds in one operation
    assert ((powers - expected).abs() <= two_roundings * expected).all()
    assert ((gelus - F.gelu(wide)).abs() <= 2.4e-7 * wide.abs().clamp_min(1)).all()


@compiled
def functions(x, output):
    for k in range(0, x.size, lanes(x)):
        store(output, (0, k), exp2(load(x, (k,))))
        store(output, (1, k), gelu(load(x, (k,))))
        store(output, (2, k), without_denormals(load(x, (k,))))


def test_functions_of_float64_are_libms():
    x = np.linspace(-30, 30, 1024)
    output = np.empty((3, x.size))
    functions(x, output)
    np.testing.assert_allclose(output[0], np.exp2(x), rtol=1e-15)
    np.testing.assert_allclose(output[1], F.gelu(torch.from_numpy(x)).numpy(), rtol=0, atol=1e-14)
    assert np.array_equal(output[2], x)


def test_what_counts_for_nothing_is_zero_in_float32():
    x = np.array([0, TINY, -TINY, TINY / 2, -TINY / 2, 1, -1, math.inf] * 8, np.float32)
    output = np.empty((3, x.size), np.float32)
    functions(x, output)
    assert np.array_equal(output[2], np.where(np.abs(x) < TINY, 0, x))


# --- Threads ---


def test_one_pool_serves_all_numbers_of_threads(threads):
    _pool.cache_clear()
    for count in (2, 5, 3, 2):
        threads(count)
        in_threads(range(100), lambda: lambda job: None, count)
    assert _pool.cache_info().misses == 1


def test_an_error_in_one_thread_is_raised(threads):
    threads(2)

    def do(job):
        if job == 3:
            raise IndexError(job)

    with pytest.raises(IndexError, match="3"):
        in_threads(range(100), lambda: do, 2)


@pytest.mark.parametrize(("images", "rows", "least"), [(1, 1, 4), (2, 7, 4), (3, 100, 4), (1, 100, 200)])
def test_jobs_are_all_rows_once(threads, images, rows, least):
    threads(3)
    jobs = row_jobs(images, rows, least)
    done = [(image, row) for image, start, stop in jobs for row in range(start, stop)]
    assert done == [(image, row) for image in range(images) for row in range(rows)]
    assert all(stop - start >= least or stop == rows for _, start, stop in jobs)


@pytest.mark.parametrize("most", [0, 1, 2, 9])
def test_every_job_is_done_once(threads, most):
    threads(4)
    done, workers = [], []

    def worker():
        workers.append(None)
        return done.append

    in_threads(range(50), worker, most)
    assert sorted(done) == list(range(50))
    assert 1 <= len(workers) <= max(1, min(4, most))
