"""Checks of options, shared by all jobs."""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

__all__ = [
    "at_least",
    "check_components",
    "check_error_floor",
    "check_method_options",
    "check_seed",
    "check_shard_images",
    "own_options",
    "parse_layers",
    "parse_size",
    "parse_workers",
    "positive",
]

_MOST_SHARD_IMAGES = 1 << 20

Options = TypeVar("Options")


def parse_size(option: str, text: str) -> tuple[int, int]:
    """ "224" → (224, 224); "224x336" → (224, 336): height, width.

    Raises:
        ValueError: ``text`` is not a size.
    """
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise ValueError(f'{option} is in pixels, "224" or "HEIGHTxWIDTH": got {text!r}')
    return int(match[1]), int(match[2] or match[1])


def parse_layers(option: str, text: str | None) -> tuple[int, ...] | None:
    """ "10" → (10,); "8,9,-1" → (8, 9, -1). None, an omitted option, gives None.

    Raises:
        ValueError: ``text`` is not a list of whole numbers.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} is a layer or several, N or N,N,…: got {text!r}") from None


def parse_workers(option: str, value: int | str | None) -> tuple[int, int] | None:
    """ "8" or 8 → (8, 8); "2:8" → (2, 8): smallest and largest number. None, an omitted option, gives None.

    Raises:
        ValueError: ``value`` is neither a whole number nor a range.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
    if not match:
        raise ValueError(f'{option} is a number or a range, "8" or "MIN:MAX": got {str(value)!r}')
    least, most = int(match[1]), int(match[2] or match[1])
    if match[2] and not 1 <= most >= least:
        raise ValueError(f"{option} {value} is empty: the largest number must be at least 1 and the smallest")
    return least, most


def at_least(option: str, value: float | None, least: float) -> None:
    """Refuse a value below ``least``, NaN and infinity. None, an omitted option, passes.

    Raises:
        ValueError: the value is refused.
    """
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{option} must be a finite number: got {value}")
    if value < least:
        raise ValueError(f"{option} must be at least {least}: got {value}")


def check_components(option: str, value: float | None) -> None:
    """Refuse a value that is neither a number of components, 1 or more, nor a share of the variance, 0 … 1.

    Raises:
        ValueError: the value is refused.
    """
    if value is None or (0 < value < 1 if isinstance(value, float) else value >= 1):
        return
    raise ValueError(
        f"{option} is a number of components, such as 64, or a share of the variance to explain, between 0 and 1, such "
        f"as 0.95: got {value}"
    )


def check_error_floor(value: float | None, dtype: str) -> None:
    """Refuse an error floor outside of 0 … 1, and any for float16, which has no steps.

    Args:
        value: the floor; None, an omitted option, passes.
        dtype: data type of the stored features.

    Raises:
        ValueError: the value is refused.
    """
    at_least("--error-floor", value, 0)
    if value is None:
        return
    if value > 1:
        raise ValueError(f"--error-floor must be at most 1, or next to nothing of the features is left: got {value}")
    if dtype != "int8":
        raise ValueError(f"--error-floor {value} is for --dtype int8: got {dtype}, expected one of the two")


def positive(option: str, value: float) -> None:
    """Refuse zero, negative numbers, NaN and infinity.

    Raises:
        ValueError: the value is refused.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{option} must be positive and finite: got {value}")


def check_seed(value: int) -> None:
    """Refuse a seed that torch's generators do not take.

    Raises:
        ValueError: the value is refused.
    """
    if not 0 <= value < 2**63:
        raise ValueError(f"--seed must be at least 0 and less than 2^63: got {value}")


def check_shard_images(value: int | None) -> None:
    """Refuse a shard of no images, or of more than a million: its index is made in memory. None passes.

    Raises:
        ValueError: the value is refused.
    """
    at_least("--shard-images", value, 1)
    if value is not None and value > _MOST_SHARD_IMAGES:
        raise ValueError(f"--shard-images must be at most {_MOST_SHARD_IMAGES}: got {value}")


def own_options(config: object, kind: type[Options]) -> Options:
    """Extract the options of one method from a configuration that holds those of several.

    Args:
        config: has the attributes of ``kind``, with the same names.
        kind: dataclass of the method's options.

    Raises:
        ValueError: from the checks of ``kind``.
    """
    named: Any = {field.name: getattr(config, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**named)


def check_method_options(config: object, chosen: str, methods: Mapping[str, type]) -> None:
    """Check the options of every method, and refuse those given for a method that was not chosen.

    Args:
        config: has the attributes of all the dataclasses in ``methods``.
        chosen: value of --upsampler.
        methods: upsampler name -> dataclass of its options. An option may belong to several.

    Raises:
        ValueError: a value is out of range, or an option that ``chosen`` does not have differs from its default.
    """
    takers: dict[str, list[str]] = {}
    defaults = {}
    for name, kind in methods.items():
        own_options(config, kind)
        for field in fields(kind):
            takers.setdefault(field.name, []).append(name)
            defaults[field.name] = field.default
    for option, names in takers.items():
        value = getattr(config, option)
        if value != defaults[option] and chosen not in names:
            raise ValueError(
                f"--{option.replace('_', '-')} {value} is for --upsampler {' or '.join(names)}: got {chosen}"
            )
