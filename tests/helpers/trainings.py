"""Trainings that take seconds: small networks with random weights on a few photographs."""

from pathlib import Path
from typing import Any

import skimage
from PIL import Image

from schemas.train_options import TrainConfig

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def write_photographs(folder: Path, count: int, *, first: int = 0) -> Path:
    """``count`` crops of scikit-image's photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in NAMES]
    for i in range(first, first + count):
        left, top = 9 * i, 5 * i
        pictures[i % len(pictures)].crop((left, top, left + 170, top + 150)).save(folder / f"{i:02}.png")
    return folder


def options(photographs: Path, output: Path | str, **changed: Any) -> dict[str, Any]:
    """Of a training on ``photographs/train``, measured on ``photographs/val``."""
    of_jbu = {"jitters": 2, "projection_chs": 6} if changed.get("upsampler", "jbu") == "jbu" else {}
    return {
        **of_jbu,
        "images": str(photographs / "train"),
        "val_images": str(photographs / "val"),
        "output": str(output),
        "backbones": ("resnet18@3=random",),
        "size": "64",
        "val_count": 2,
        "val_views": 2,
        "steps": 4,
        "batch_size": 2,
        "max_pad_px": 8,
        "checkpoint_every": 2,
        "evaluate_every": 2,
        "device": "cpu",
        **changed,
    }


def train_config(photographs: Path, output: Path | str, **changed: Any) -> TrainConfig:
    return TrainConfig(**options(photographs, output, **changed))


def arguments(config_options: dict[str, Any]) -> list[str]:
    """The same, for the command line."""
    texts: list[str] = []
    for name, value in config_options.items():
        texts += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [str(value)])]
    return texts
