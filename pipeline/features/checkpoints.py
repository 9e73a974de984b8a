"""Checkpoints: read a weights file safely, load it strictly, and identify its contents by a digest."""

import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from densefeat.errors import PlaceError, StorageUnavailable, WrongClock
from densefeat.storage.places import is_local, open_place
from densefeat.storage.retries import retried
from pipeline.errors import JobError

__all__ = ["at_hand", "load_strict", "read_metadata", "read_state_dict", "remote_files", "state_digest"]

_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_SUFFIXES = (".safetensors", *_PICKLED)
# Keys under which trainers store weights. Averaged weights come first, as in timm: they are the evaluated ones.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Prefixes that DataParallel and torch.compile add to every name.
_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 8
_AT_HAND: ContextVar[Mapping[str, bytes]] = ContextVar("files at hand", default=MappingProxyType({}))


def read_state_dict(uri: str) -> dict[str, Tensor]:
    """Read the weights from a checkpoint file, without running any code in it.

    Training checkpoints are unwrapped: the weights may be under ``state_dict_ema``, ``model_ema``, ``state_dict`` or
    ``model`` (tried in this order), and a prefix ``module.`` or ``_orig_mod.`` of *every* name is removed.

    Args:
        uri: a ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` file: a local path, or any URI that
            fsspec supports (read into memory first).

    Returns:
        Name -> tensor on the CPU, with the shapes and dtypes of the file; never empty.

    Raises:
        JobError: the file is missing, cannot be fetched, has another suffix, is damaged, holds pickled objects other
            than tensors and plain containers, or is not a dictionary of tensors.
    """
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix not in _SUFFIXES:
        raise JobError(
            f"Weights {uri!r}: got a file with the suffix {suffix!r}, expected one of {', '.join(_SUFFIXES)}. Convert "
            "the checkpoint, or rename the file if it is one of these formats."
        )
    read = _read_pickled if suffix in _PICKLED else _read_safetensors
    return _clean(read(_opened(uri), uri), uri)


def read_metadata(uri: str) -> dict[str, str]:
    """Read the metadata of a ``.safetensors`` file; empty if it has none, and for other formats.

    Raises:
        JobError: the file is missing, cannot be fetched or is damaged.
    """
    if PurePosixPath(uri).suffix.lower() != ".safetensors":
        return {}
    return _read_safetensors_metadata(_opened(uri), uri)


def remote_files(uris: Iterable[str]) -> dict[str, bytes]:
    """Contents of those checkpoint files that are not on this machine's file systems, by URI, for `at_hand`.

    Raises:
        JobError: a file is missing, or cannot be fetched.
    """
    opened = {uri: _opened(uri) for uri in uris if not is_local(uri)}
    return {uri: file for uri, file in opened.items() if isinstance(file, bytes)}


@contextmanager
def at_hand(files: Mapping[str, bytes]) -> Iterator[None]:
    """In the block, take these files from memory instead of fetching them."""
    token = _AT_HAND.set(files)
    try:
        yield
    finally:
        _AT_HAND.reset(token)


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], *, what: str, ignore_unexpected: Collection[str] = ()
) -> None:
    """Copy every tensor of ``state`` into ``module``, in place, or change nothing and raise.

    Values are cast to the module's dtypes, so a float16 checkpoint fills a float32 module; a cast between floating
    point and integers is an error. BatchNorm's ``num_batches_tracked`` may be absent, as in
    ``nn.Module.load_state_dict``: checkpoints older than the counter lack it, and inference does not use it.

    Args:
        module: the module to fill; its device and dtypes are kept.
        state: name -> tensor, as from `read_state_dict`.
        what: describes both sides in the error, e.g. ``"weights s3://b/vit.pth into vit_small_patch14_dinov2"``.
        ignore_unexpected: names that may be in ``state`` but not in ``module``: ``"head"`` covers ``head`` itself and
            everything below it (``head.weight``, ``head.bias``), and nothing else (not ``head_dist.weight``).

    Raises:
        JobError: a tensor is missing, unexpected, not finite, or has another shape or kind of dtype. All kinds of
            mismatch are reported together, the first few of each, with counts.
    """
    wanted: dict[str, Tensor] = module.state_dict()
    missing = [n for n in wanted if n not in state and n.rpartition(".")[2] != "num_batches_tracked"]
    unexpected = [n for n in state if n not in wanted and not _is_below(n, ignore_unexpected)]
    unlike = [f"{n} (got {_kind(state[n])}, expected {_kind(wanted[n])})" for n in wanted if _differ(n, state, wanted)]
    spoiled = [n for n in wanted if n in state and not state[n].isfinite().all()]
    problems = [
        _listing(unlike, "of another shape or kind"),
        _listing(missing, "missing from the weights"),
        _listing(unexpected, "not in the model"),
        _listing(spoiled, "with NaN or infinity"),
    ]
    if any(problems):
        raise JobError(
            f"Cannot load {what}: got {len(state)} tensors, expected the {len(wanted)} of the model; "
            f"{'; '.join(p for p in problems if p)}. Check that the weights are for this model, and complete."
        )
    module.load_state_dict({n: t for n, t in state.items() if n in wanted}, strict=False)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of a state dictionary: equal exactly if names, dtypes, shapes and values are equal.

    It does not depend on the file format, the order of names, the devices or the memory layout.

    Args:
        state: name -> dense tensor, any dtypes, any devices.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        # The JSON line implies how many bytes follow, so different dictionaries give different byte streams.
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _opened(uri: str) -> Path | bytes:
    """Path of a local file, after checking that it opens; or contents of a remote file, so no disk is needed."""
    if (data := _AT_HAND.get().get(uri)) is not None:
        return data
    try:
        filesystem, path = open_place(uri)
        if not isinstance(filesystem, LocalFileSystem):
            return bytes(retried(lambda: filesystem.cat_file(path), uri))
        with Path(path).open("rb"):  # missing, a directory or unreadable: detected here, not by the parsers
            return Path(path)
    except FileNotFoundError as error:
        raise JobError(f"Weights {uri!r}: got no such file, expected a checkpoint. Check the path or URI.") from error
    except PlaceError as error:
        raise JobError(f"Weights: {error}") from error
    except (StorageUnavailable, WrongClock):
        raise
    except Exception as error:  # each file system's client raises its own types
        raise JobError(
            f"Weights {uri!r}: got {_line(error)} on opening it, expected a readable checkpoint file. Check the URI, "
            "the credentials, and that the fsspec client of its scheme is installed."
        ) from error


def _read_safetensors(file: Path | bytes, uri: str) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        return load(file) if isinstance(file, bytes) else load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise _damaged(uri, error) from error


def _read_safetensors_metadata(file: Path | bytes, uri: str) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        if isinstance(file, bytes):  # the length, then a JSON header
            header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
            return dict(header.get("__metadata__", {}))
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, ValueError, AttributeError, TypeError, OSError) as error:
        raise _damaged(uri, error) from error


def _read_pickled(file: Path | bytes, uri: str) -> object:
    try:
        with warnings.catch_warnings():
            # Pickle protocols other than torch.save's either parse or fail below: the warning adds nothing.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            source = io.BytesIO(file) if isinstance(file, bytes) else file
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything: EOFError, KeyError, struct.error …
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise _damaged(uri, error) from error
        raise JobError(
            f"Weights {uri!r}: got a pickle that calls {refused[1]}, expected tensors and plain containers only; "
            "none of its code was run. If you trust its source, load it where it was made and save model.state_dict() "
            "as .safetensors."
        ) from error


def _clean(loaded: object, uri: str) -> dict[str, Tensor]:
    """Remove wrappers and prefixes, and check that the rest is a dictionary of tensors."""
    while isinstance(loaded, Mapping):
        inner = next((loaded[k] for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        got = "an empty dictionary" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise _not_a_state_dict(uri, got)
    others = [f"{k!r}: {type(v).__name__}" for k, v in loaded.items() if not (isinstance(k, str) and _is_tensor(v))]
    if others:
        raise _not_a_state_dict(uri, _listing(others, "that are not named tensors"))
    state = {str(k): v.detach() for k, v in loaded.items()}
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in state)), ""):
        state = {n.removeprefix(prefix): t for n, t in state.items()}
    return state


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _not_a_state_dict(uri: str, got: str) -> JobError:
    return JobError(
        f"Weights {uri!r}: got {got}, expected a dictionary of tensors, alone or under one of {', '.join(_WRAPPERS)}. "
        "Save model.state_dict() and use that file."
    )


def _damaged(uri: str, error: Exception) -> JobError:
    return JobError(
        f"Weights {uri!r}: got a file that cannot be parsed ({_line(error)}), expected a complete "
        f"{PurePosixPath(uri).suffix} checkpoint. It is damaged, truncated or of another format: fetch it again."
    )


def _line(error: Exception) -> str:
    """An error on one line; for torch's long ``weights_only`` message, only the sentence about this file."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def _listing(names: Iterable[str], label: str) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return f"{len(listed)} {label}: {', '.join(listed[:_LISTED])}{more}" if listed else ""


def _is_below(name: str, parents: Collection[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _differ(name: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    if name not in state:
        return False
    got, expected = state[name], wanted[name]
    return got.shape != expected.shape or got.is_floating_point() != expected.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
