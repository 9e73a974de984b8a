"""What one value of --features asks for: a store, or options of the main job."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from pipeline.errors import JobError
from schemas.options import UpsampleConfig

__all__ = ["SideOptions", "parse_side"]

_NOT_IN_A_SIDE = ("images", "store", "resume", "append", "overwrite", "dry_run", "measure", "shards")


@dataclass(frozen=True)
class SideOptions:
    """What one value of --features asks for.

    Attributes:
        name: in tables and pictures.
        store: folder or URI of a store; None: features are computed with ``options``.
        options: of the main job.
        first: number of components to use; None: all.
    """

    name: str
    store: str | None
    options: Mapping[str, Any]
    first: int | None = None

    @property
    def weights(self) -> str | None:
        """Weights of the backbone, as passed to the main job; None for a store."""
        return self.options.get("weights", "pretrained") if self.store is None else None


def parse_side(text: str) -> SideOptions:
    """Parse a value of --features.

    Raises:
        JobError: it names an unknown option, or a value does not fit its option.
    """
    parts = re.split(r",(?=[a-z_]+=)", text)
    if not all(re.match(r"[a-z_]+=", part) for part in parts):
        return SideOptions(text, text, {})
    pairs = [part.split("=", 1) for part in parts]
    named = dict(pairs)
    if repeated := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise JobError(f"--features {text}: {', '.join(repeated)} is there more than once")
    name, store = named.pop("name", None), named.pop("store", None)
    first = _typed(text, "first", named.pop("first"), int) if "first" in named else None
    if store is not None:
        if named:
            raise JobError(f"--features {text}: a store has its own options, leave out {', '.join(named)}")
        return SideOptions(name or text, store, {}, first)
    known = get_type_hints(UpsampleConfig)
    if unknown := [option for option in named if option not in known or option in _NOT_IN_A_SIDE]:
        allowed = ", ".join(["name", "store", "first", *sorted({*known} - {*_NOT_IN_A_SIDE})])
        raise JobError(f"--features {text}: unknown {', '.join(unknown)}; expected {allowed}")
    options = {option: _typed(text, option, value, known[option]) for option, value in named.items()}
    return SideOptions(name or text, None, options, first)


def _typed(side: str, option: str, value: str, hint: Any) -> Any:
    """A value of the option's type: int, float, bool, str, or a literal."""
    kinds = get_args(hint) or (hint,)
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    if bool in kinds and value in ("true", "false"):
        return value == "true"
    if str in kinds or value in kinds or any(value in get_args(kind) for kind in kinds):
        return value
    choices = [choice for kind in (hint, *kinds) for choice in get_args(kind) if isinstance(choice, str)]
    expected = " or ".join(choices or (["true", "false"] if bool in kinds else ["a number"]))
    raise JobError(f"--features {side}: {option}={value}: expected {expected}")
