"""What the device does with batches: copies ahead of their use, dequantization, reconstruction."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from densefeat.store import FeatureStore

__all__ = ["Dequantize", "Reconstruct", "to_device"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Dequantize(nn.Module):
    """Stored codes [n, k, H, W] → components [n, k, H, W]: code × step, in one pass over the codes.

    Of a compact store: codes [n, k, h, w] and guidance → [n, k, H, W], with the last step of upsampling.

    Args:
        store: a ``FeatureStore``, or its location.
        dtype: of the result: float32, float16 or bfloat16.

    Raises:
        ValueError: ``dtype`` is another.
        StoreError: there is no store, or it is damaged.
    """

    step: torch.Tensor | None

    def __init__(self, store: FeatureStore | str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        store, self.dtype = _opened(store), _checked(dtype)
        self.register_buffer("step", None if store.step is None else torch.tensor(store.step)[:, None, None])
        self.last_step = store.last_step

    def forward(self, codes: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize int8 (or float16) codes [n, k, H, W] to ``dtype``.

        Args:
            codes: as stored.
            guidance: of a compact store that has such images: [n, 3, H, W] uint8.

        Raises:
            TypeError: the codes are not of the store's type, e.g. dequantized before.
            ValueError: the last step of a compact store needs guidance, and there is none.
        """
        _check_codes(codes, self.step is not None)
        if self.step is None:
            values = codes.to(self.dtype)
        else:  # the product is float32 inside the kernel, and only rounded to dtype
            values = torch.mul(codes, self.step, out=torch.empty_like(codes, dtype=self.dtype))
        if self.last_step is None:
            return values
        features: torch.Tensor = self.last_step(values, guidance)
        return features


class Reconstruct(nn.Module):
    """Stored codes [n, k, H, W] → backbone channels [n, C, H, W], as ``FeatureStore.reconstruct``.

    One matrix product: the quantization steps are folded into the PCA basis. Codes are exact in all three types; the
    folded basis is rounded to ``dtype``, products are summed in float32 on a GPU. Of a compact store, the last step of
    upsampling comes before, in components.

    Args:
        store: a ``FeatureStore``, or its location.
        dtype: of the product and the result: float32, float16 or bfloat16.
        memory_format: of the result: ``torch.contiguous_format`` or ``torch.channels_last``.

    Raises:
        ValueError: ``dtype`` or ``memory_format`` is another.
        StoreError: there is no store, or it is damaged.
    """

    basis: torch.Tensor
    mean: torch.Tensor

    def __init__(
        self,
        store: FeatureStore | str | os.PathLike[str],
        dtype: torch.dtype = torch.bfloat16,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        store, self.memory_format = _opened(store), memory_format
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(f"memory_format must be contiguous_format or channels_last: got {memory_format}")
        basis = torch.tensor(store.components)  # [k, C]
        self.quantized = store.step is not None
        self.dequantize = None if store.last_step is None else Dequantize(store, dtype)
        if store.step is not None and self.dequantize is None:
            basis = basis * torch.from_numpy(store.step)[:, None]
        self.register_buffer("basis", basis.to(_checked(dtype)))
        self.register_buffer("mean", torch.tensor(store.mean, dtype=dtype))

    def forward(self, codes: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruct channels [n, C, H, W] in ``dtype`` from int8 (or float16) codes [n, k, H, W].

        Args:
            codes: as stored.
            guidance: of a compact store that has such images: [n, 3, H, W] uint8.

        Raises:
            TypeError: the codes are not of the store's type, e.g. dequantized before.
            ValueError: the last step of a compact store needs guidance, and there is none.
        """
        _check_codes(codes, self.quantized)
        maps = codes if self.dequantize is None else self.dequantize(codes, guidance)
        n, _, height, width = maps.shape
        values = maps.flatten(2).to(self.basis.dtype)  # [n, k, H·W]
        if self.memory_format == torch.channels_last:
            channels = torch.baddbmm(self.mean, values.transpose(1, 2), self.basis.expand(n, -1, -1))  # [n, H·W, C]
            return channels.transpose(1, 2).view(n, -1, height, width)
        channels = torch.baddbmm(self.mean[:, None], self.basis.T.expand(n, -1, -1), values)  # [n, C, H·W]
        return channels.view(n, -1, height, width)


def to_device(batches: Iterable[dict[str, Any]], device: torch.device | str) -> Iterator[dict[str, Any]]:
    """Batches of a loader, their tensors on ``device``; on a GPU copied while the batch before is in use.

    On a GPU, tensors are put into pinned memory unless they are there (``DataLoader(pin_memory=True)``), and copied on
    a stream of its own, one batch ahead. Elsewhere, batches are passed on, on the device.

    Args:
        batches: a loader or dataset; each batch a dict, of which the tensors are copied.
        device: where to.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield _moved(batch, device)
        return
    yield from _copied_ahead(batches, device)


def _copied_ahead(batches: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[dict[str, Any], torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            pinned = {name: value.pin_memory() if _is_tensor(value) else value for name, value in batch.items()}
            copy = _moved(pinned, device)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        if ahead is not None:
            yield _ready(*ahead, device)
        ahead = copy, copied
    if ahead is not None:
        yield _ready(*ahead, device)


def _ready(batch: dict[str, Any], copied: torch.cuda.Event, device: torch.device) -> dict[str, Any]:
    """The batch, for the stream in use: it waits for the copy, and the memory is not reused before its work is done."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for value in batch.values():
        if _is_tensor(value):
            value.record_stream(current)
    return batch


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device, non_blocking=True) if _is_tensor(value) else value for name, value in batch.items()}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _opened(store: FeatureStore | str | os.PathLike[str]) -> FeatureStore:
    return store if isinstance(store, FeatureStore) else FeatureStore(store)


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16: got {dtype}")
    return dtype


def _check_codes(codes: torch.Tensor, quantized: bool) -> None:
    expected = torch.int8 if quantized else torch.float16
    if codes.dtype != expected:
        raise TypeError(
            f"expected stored codes of {expected}: got {codes.dtype}; read them with dequantize=False, or read_codes"
        )
