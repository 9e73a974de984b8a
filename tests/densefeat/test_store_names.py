import tracemalloc
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from densefeat import layout
from densefeat.layout import FeatureLayout
from densefeat.storage.parallel import results_of


def zarr_shard(codes: np.ndarray, shard_rows: int, fill_value: float) -> bytes:
    """The bytes that zarr-python itself makes of one shard."""
    stored: dict[str, Any] = {}
    shape = codes.shape[1:]
    array = zarr.create_array(
        MemoryStore(stored),
        shape=(shard_rows, *shape),
        dtype=codes.dtype,
        chunks=(1, *shape),
        shards=(shard_rows, *shape),
        filters=None,
        compressors=[ZstdCodec(level=layout.ZSTD_LEVEL), Crc32cCodec()],
        fill_value=fill_value,
    )
    array[: len(codes)] = codes
    return stored["c/0/0/0/0"].to_bytes()


@pytest.mark.parametrize(("dtype", "fill_value"), [("int8", -128), ("float16", float("nan"))])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_shards_are_byte_identical_to_zarrs(dtype: str, fill_value: float, rows: int) -> None:
    rng = np.random.default_rng(rows)
    codes = rng.normal(scale=20, size=(rows, 3, 5, 7)).astype(dtype)
    ours, _ = layout.pack_shard([layout.encode_chunk(image) for image in codes], 4)
    assert ours == zarr_shard(codes, 4, fill_value)


@given(st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=40)), min_size=1, max_size=8), st.integers(0, 3))
def test_a_shard_gives_back_its_chunks(chunks: list[bytes | None], unused: int) -> None:
    shard_rows = len(chunks) + unused
    data, places = layout.pack_shard(chunks, shard_rows)
    assert layout.unpack_shard_index(data, shard_rows) == [*places, *[None] * unused]
    assert [None if place is None else data[place[0] : sum(place)] for place in places] == chunks


@pytest.mark.parametrize("index_first", [False, True])
def test_a_shard_takes_its_memory_once(index_first: bool) -> None:
    """The chunks that a shard is packed of are let go one by one: 1.2 times its bytes are enough for both."""
    rows, nbytes = 64, 1 << 18

    def encoded(row: int) -> "Future[bytes]":
        future: Future[bytes] = Future()
        future.set_result(bytes([row]) * nbytes)
        return future

    tracemalloc.start()
    try:
        chunks = [encoded(row) if row % 9 else None for row in range(rows)]
        waiting, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        data, places = layout.pack_shard(results_of(chunks), rows, index_first=index_first)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert waiting > 0.99 * len(data)
    assert peak < 1.2 * len(data)
    assert [place and data[place[0]] for place in places] == [row if row % 9 else None for row in range(rows)]


@given(st.data())
def test_any_flipped_bit_of_a_chunk_is_noticed(data: st.DataObject) -> None:
    features = FeatureLayout(1, 2, 3, 4, "int8", 1)
    chunk = bytearray(layout.encode_chunk(np.arange(24, dtype=np.int8).reshape(2, 3, 4)))
    bit = data.draw(st.integers(0, len(chunk) * 8 - 1))
    chunk[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="checksum"):
        layout.decode_chunk(bytes(chunk), features)


def test_a_cut_off_shard_is_noticed() -> None:
    data, _ = layout.pack_shard([b"chunk"] * 3, 3)
    with pytest.raises(ValueError, match="checksum"):
        layout.unpack_shard_index(data[:-1], 3)
    with pytest.raises(ValueError, match="truncated"):
        layout.unpack_shard_index(data[:20], 3)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64])
def test_every_row_is_in_exactly_one_shard(rows: int) -> None:
    features = FeatureLayout(rows, 2, 3, 4, "int8", 8)
    assert [row for shard in range(features.shards) for row in features.rows_of(shard)] == list(range(rows))


def test_dequantizing_broadcasts_over_any_number_of_axes() -> None:
    step = np.array([0.5, 2], dtype=np.float32)
    codes = np.array([[1, -2], [3, 127]], dtype=np.int8)
    assert np.array_equal(layout.dequantize(codes, step), [[0.5, -1], [6, 254]])
    assert np.array_equal(layout.dequantize(codes[:, 0], step), [0.5, 6])
    assert layout.dequantize(codes.astype(np.float16), None).dtype == np.float32
