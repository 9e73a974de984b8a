"""Random pixels with their labels."""

import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import densefeat.torch.pixels
from densefeat import FeatureStore, MissingFeatures, PixelFeatures
from densefeat.torch.plan import Reader
from tests.helpers.stores import FAILED_ROWS, ROWS, H, K, KnownStore, W, make_store

GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]


@pytest.fixture(scope="module", params=["int8", "float16"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / request.param), request.param)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of all rows, of three classes of which 2 is rare; 255 in a corner."""
    folder = tmp_path_factory.mktemp("masks")
    (folder / "class").mkdir()
    for row in range(ROWS):
        mask = np.random.default_rng(row).choice([0, 1, 2], p=[0.6, 0.38, 0.02], size=(2 * H, 2 * W)).astype(np.uint8)
        mask[:8, :8] = 255
        Image.fromarray(mask).save(folder / "class" / f"{row:03d}.png")
    return folder


def pixels_of(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    joined = torch.cat([torch.cat([b["row"][:, None], b["yx"], b["label"][:, None]], dim=1) for b in batches])
    return [tuple(pixel) for pixel in joined.tolist()]


def test_pixels_have_their_features_and_labels(known: KnownStore, masks: Path) -> None:
    store = FeatureStore(known.uri)
    batches = list(PixelFeatures(store, masks, pixels=20, batch_size=32, ignore_index=255))
    assert [len(batch["row"]) for batch in batches] == [32] * 5 + [20]
    for batch in batches:
        assert (batch["features"].dtype, batch["features"].shape[1]) == (torch.float32, K)
        assert {batch[name].dtype for name in ("label", "row", "yx")} == {torch.int64}
        assert len(batch["row"].unique()) > 3  # images are mixed
        for features, label, row, (y, x) in zip(
            batch["features"], batch["label"], batch["row"].tolist(), batch["yx"].tolist(), strict=True
        ):
            assert np.array_equal(features.numpy(), store.read(row)[:, y, x])
            mask = np.asarray(Image.open(masks / "class" / f"{row:03d}.png"))
            assert label == store.align(mask, row)[y, x] != 255
    pixels = pixels_of(batches)
    assert len(set(pixels)) == len(pixels) == 20 * len(GOOD_ROWS)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_share_the_pixels_of_an_epoch(known: KnownStore, masks: Path, start_method: str) -> None:
    dataset = PixelFeatures(known.uri, masks, pixels=15, batch_size=16, seed=3)
    dataset.set_epoch(1)
    alone = sorted(pixels_of(list(dataset)))
    context = multiprocessing.get_context(start_method)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=context, persistent_workers=True
    )
    assert sorted(pixels_of(list(loader))) == alone
    dataset.set_epoch(2)  # seen by workers that are kept
    assert sorted(pixels_of(list(loader))) == sorted(pixels_of(list(dataset))) != alone


def test_seed_and_epoch_decide(known: KnownStore, masks: Path) -> None:
    def drawn(seed: int, epoch: int, **options: Any) -> list[tuple[int, ...]]:
        dataset = PixelFeatures(known.uri, masks, pixels=15, seed=seed, **options)
        dataset.set_epoch(epoch)
        return pixels_of(list(dataset))

    assert drawn(0, 0) == drawn(0, 0, threads=5)
    assert len({tuple(sorted(drawn(seed, epoch))) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert drawn(0, 0, batch_size=7) == drawn(0, 0)


def test_balanced_classes(known: KnownStore, masks: Path) -> None:
    def counts(**options: Any) -> torch.Tensor:
        dataset = PixelFeatures(known.uri, masks, pixels=12, rows=[5], ignore_index=255, **options)
        return torch.bincount(next(iter(dataset))["label"], minlength=3)

    mask = np.asarray(Image.open(masks / "class" / "005.png"))
    rare = int((FeatureStore(known.uri).align(mask, 5) == 2).sum())
    balanced = counts(balanced=True)
    assert balanced.sum() == counts().sum() == 12
    assert balanced[2] == min(rare, 4)
    assert abs(balanced[0] - balanced[1]) <= 1


def test_images_with_few_labelled_pixels(known: KnownStore) -> None:
    def mask(key: str) -> np.ndarray:
        labels = np.full((2 * H, 2 * W), 255)
        if key == "class/005.jpg":
            labels[10:14, 10:14] = 1
        return labels

    dataset = PixelFeatures(known.uri, mask, ignore_index=255)
    (batch,) = list(dataset)
    assert set(batch["row"].tolist()) == {5}
    expected = FeatureStore(known.uri).align(mask("class/005.jpg"), 5) == 1
    assert len(batch["row"]) == expected.sum() > 0
    assert list(PixelFeatures(known.uri, mask, rows=[4], ignore_index=255)) == []


def test_what_is_refused(known: KnownStore, masks: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFeatures) as caught:
        PixelFeatures(known.uri, masks, rows=[1, *FAILED_ROWS])
    assert caught.value.rows == FAILED_ROWS
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "000.png").write_bytes((masks / "class" / "000.png").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"8 of 9 rows have no mask: 'class/001\.jpg'.* and 5 more"):
        PixelFeatures(known.uri, tmp_path)
    for options in ({"pixels": 0}, {"batch_size": 0}, {"seed": -1}, {"threads": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            PixelFeatures(known.uri, masks, **options)
    with pytest.raises(ValueError, match=r"'class/0\d\d\.jpg' does not fit its image"):
        list(PixelFeatures(known.uri, lambda key: np.zeros((H, W), int)))
    with pytest.raises(ValueError, match=r"must be integers .*float64"):
        list(PixelFeatures(known.uri, lambda key: np.zeros((2 * H, 2 * W))))


def of_reader(dataset: PixelFeatures, reader: Reader, position: dict[str, int] | None = None) -> list[tuple[Any, ...]]:
    """(position after it, its pixels) of each batch that one worker gives."""
    batches = dataset._batches(0, reader, position or dataset._START)
    return [(reached, pixels_of([batch])) for reached, batch in batches]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.integers(1, 3), workers=st.integers(1, 2), batch_size=st.integers(1, 40), taken=st.integers(0, 30),
    per_image=st.sampled_from([3, 17, 10**6]), mixed=st.sampled_from([1, 2, 32]),
)  # fmt: skip
def test_ranks_and_workers_and_a_resume_of_any(
    known: KnownStore, masks: Path, world_size: int, workers: int, batch_size: int, taken: int, per_image: int,
    mixed: int,
) -> None:  # fmt: skip
    store = FeatureStore(known.uri)
    options: dict[str, Any] = {"pixels": per_image, "batch_size": batch_size, "ignore_index": 255, "request_bytes": 400}
    expected = sorted(pixels_of(list(PixelFeatures(store, masks, **options))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(densefeat.torch.pixels, "_IMAGES_MIXED", mixed)
        read: dict[str, list[tuple[int, ...]]] = {"pad": [], "keep": []}
        batches: dict[str, set[int]] = {"pad": set(), "keep": set()}
        for uneven, rank in itertools.product(read, range(world_size)):
            dataset = PixelFeatures(store, masks, **options, uneven=uneven, rank=rank, world_size=world_size)
            of_workers = [of_reader(dataset, Reader(rank, world_size, worker, workers)) for worker in range(workers)]
            batches[uneven].add(sum(map(len, of_workers)))
            read[uneven] += [pixel for batches_of_it in of_workers for _, pixels in batches_of_it for pixel in pixels]
            if taken <= len(of_workers[-1]):
                position = of_workers[-1][taken - 1][0] if taken else None
                reader = Reader(rank, world_size, workers - 1, workers)
                assert of_reader(dataset, reader, position) == of_workers[-1][taken:]
            if uneven == "pad" and world_size > 1:
                assert {len(pixels) for batches_of_it in of_workers for _, pixels in batches_of_it} == {batch_size}
    assert sorted(read["keep"]) == expected
    assert sorted(set(read["pad"])) == expected
    assert len(batches["pad"]) == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_resuming_with_a_stateful_loader(known: KnownStore, masks: Path) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        dataset = PixelFeatures(known.uri, masks, pixels=15, batch_size=16, seed=3)
        return StatefulDataLoader(dataset, batch_size=None, num_workers=2)

    whole = [pixels_of([batch]) for batch in loader()]
    for taken in (0, 3, len(whole)):
        first = loader()
        iterator = iter(first)
        for _ in range(taken):
            next(iterator)
        second = loader()
        second.load_state_dict(first.state_dict())
        assert [pixels_of([batch]) for batch in second] == whole[taken:]


def test_ranks_without_images_or_labels(known: KnownStore, masks: Path) -> None:
    dataset = PixelFeatures(known.uri, masks, rows=[1, 3, 4], rank=0, world_size=4)
    with pytest.raises(ValueError, match="3 images are fewer than 4 ranks"):
        next(iter(dataset))
    dataset = PixelFeatures(known.uri, lambda key: np.full((2 * H, 2 * W), 255), ignore_index=255, rank=0, world_size=2)
    with pytest.raises(ValueError, match="none of 4 images has a pixel with a label"):
        next(iter(dataset))
