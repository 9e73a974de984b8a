"""Make a picture of what is in a store: photo | low-resolution features | high-resolution features.

    python -m jobs.show_features --store features/ --output features.png

Low-resolution features are computed again, with the backbone that the store names; its weights must be the same.
"""

from dataclasses import dataclass
from pathlib import Path

from densefeat.store import FeatureStore
from jobs.command_line import DONE, run
from pipeline.backbone import build_backbone
from pipeline.errors import JobError
from pipeline.picture import comparison
from schemas.index import OK


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Which rows of which store."""

    # The store.
    store: str
    # The picture to write.
    output: Path = Path("features.png")
    # Rows to show; not given: the first four that have features.
    rows: tuple[int, ...] = ()
    # Weights of the backbone as given to the main job; "none" leaves the low-resolution features out.
    weights: str = "pretrained"

    def __post_init__(self) -> None:
        """Check what can be checked without looking at anything."""
        if self.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--output is a picture, .png, .jpg or .webp: got {self.output}")


def show(config: ShowConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        StoreError: there is no store.
        JobError: the weights are not those that made the store, or no row can be shown.
    """
    store = FeatureStore(config.store)
    statuses = store.index["status"].to_pylist()
    rows = config.rows or [row for row, status in enumerate(statuses) if status == OK][:4]
    if unknown := [row for row in rows if not -len(store) <= row < len(store)]:
        raise JobError(f"--rows {unknown}: the store has rows 0 … {len(store) - 1}")
    if not rows:
        raise JobError(f"no row of {config.store} has features yet")
    backbone = None
    if config.weights != "none":
        stored = store.attributes["configuration"]
        name, layer, size = stored["backbone"]["name"], stored["backbone"]["layer"], stored["geometry"]["size"]
        backbone = build_backbone(name, size=tuple(size), weights=config.weights, layer=layer)
        if backbone.identity()["weights"] != stored["backbone"]["weights"]:
            raise JobError(f"--weights {config.weights} are not those that made {config.store}: give those, or none")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    comparison(store, rows, backbone).save(config.output)
    print(config.output)
    return DONE


if __name__ == "__main__":
    run(ShowConfig, show, __doc__ or "")
