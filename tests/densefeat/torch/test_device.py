"""Dequantization and reconstruction of batches of codes, and copies to the device."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from densefeat import FeatureStore, StreamingFeatures, TorchFeatures
from densefeat.torch import Dequantize, Reconstruct, to_device
from tests.helpers.stores import H, K, KnownStore, W

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device")])]  # fmt: skip
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dequantize_is_read(known: KnownStore, dtype: torch.dtype, device: str) -> None:
    store = FeatureStore(known.uri)
    module = Dequantize(store, dtype).to(device)
    features = module(torch.from_numpy(known.codes[[1, 4]]).to(device))
    assert (features.dtype, features.shape) == (dtype, (2, K, H, W))
    # Rounded once, from the float32 values.
    assert torch.equal(features.cpu(), torch.from_numpy(store.read([1, 4])).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reconstruct_is_that_of_the_store(
    known: KnownStore, dtype: torch.dtype, device: str, memory_format: torch.memory_format
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    store = FeatureStore(known.uri)
    module = Reconstruct(store, dtype, memory_format).to(device)
    channels = module(torch.from_numpy(known.codes[[1, 4]]).to(device))
    expected = np.stack([store.reconstruct(store.read(row)) for row in (1, 4)])
    assert (channels.dtype, channels.shape) == (dtype, expected.shape)
    assert channels.is_contiguous(memory_format=memory_format)
    error = np.abs(channels.float().cpu().numpy() - expected).max()
    assert error <= TOLERANCES[dtype] * np.abs(expected).max()


def test_modules_can_be_saved_and_moved(known: KnownStore) -> None:
    module, other = Reconstruct(known.uri, torch.float32), Reconstruct(known.uri, torch.float32)
    torch.nn.init.zeros_(other.basis)
    other.load_state_dict(module.state_dict())
    codes = torch.from_numpy(known.codes[:1])
    assert torch.equal(other(codes), module(codes))
    assert module.half()(codes).dtype == torch.float16


def test_modules_have_arrays_of_their_own(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    before = store.read(0)
    for module in (Dequantize(store, torch.float32), Reconstruct(store, torch.float32)):
        for tensor in module.state_dict().values():
            tensor.fill_(9)
    step = TorchFeatures(store).step
    if step is not None:
        step.fill_(9)
    assert np.array_equal(store.read(0), before)
    assert np.array_equal(store.mean, FeatureStore(known.uri).mean)
    assert np.array_equal(store.components, FeatureStore(known.uri).components)


def test_what_is_refused(known: KnownStore) -> None:
    for module in (Dequantize, Reconstruct):
        with pytest.raises(TypeError, match=r"got torch.float32; read them with dequantize=False"):
            module(known.uri)(torch.zeros(1, K, H, W))
        with pytest.raises(ValueError, match="dtype must be"):
            module(known.uri, torch.float64)
    with pytest.raises(ValueError, match="memory_format must be"):
        Reconstruct(known.uri, memory_format=torch.preserve_format)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_batches_on_the_device(known: KnownStore, device: str, pin_memory: bool) -> None:
    dataset = StreamingFeatures(known.uri, 2, dequantize=False)
    expected = [(batch["row"].tolist(), batch["key"], batch["features"].clone()) for batch in dataset]
    loader = DataLoader(dataset, batch_size=None, pin_memory=pin_memory)
    seen = []
    for batch in to_device(loader, device):
        assert batch["features"].device.type == batch["row"].device.type == device
        seen.append((batch["row"].tolist(), batch["key"], batch["features"].cpu()))
    assert [(rows, keys) for rows, keys, _ in seen] == [(rows, keys) for rows, keys, _ in expected]
    assert all(torch.equal(a, b) for (*_, a), (*_, b) in zip(seen, expected, strict=True))
