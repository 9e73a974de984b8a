"""What PCA and quantization lose of the backbone's features.

No labels: the backbone's features of an image are computed again, projected on the store's basis, quantized with the
store's steps, and reconstructed. The cosine between a cell's channels before and after is compared: on average, and in
the worst percentile of each image's cells. How many components a task needs is another question: compare
``store=…,first=16`` with others in that task.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantization import Encoding
from pipeline.evaluate.data.comparison import Comparison, counted, spread
from pipeline.evaluate.data.originals import backbone_of, check_weights, on_image, read_photo
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.evaluate.probe import share
from pipeline.evaluate.report.pictures import of_cells, photograph
from pipeline.evaluate.task import Figure, Outcome, Panel
from pipeline.features.backbone import Backbone
from schemas.evaluate_options import EvaluateConfig

__all__ = ["check", "evaluate"]

_COUNTS = (8, 16, 32, 64, 128, 256)  # components
_WORST = 0.01
_LOSS_SHOWN = 0.5  # 1 − cosine of the brightest colour in pictures


def check(config: EvaluateConfig, sides: Sequence[PlannedSide], keys: Sequence[str]) -> None:
    """Refuse stores without the weights of their backbone.

    Raises:
        JobError: as described.
    """
    check_weights(sides, config.weights)


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: the weights are not those that made a store, or an image cannot be read.
    """
    keys = spread(comparison.keys, config.limit)
    most = min(len(side.components) for side in comparison.sides)
    counts = [count for count in _COUNTS if count <= most]
    backbones = {side.name: backbone_of(side, config.weights) for side in comparison.sides}
    found = {
        side.name: torch.stack([_figures(_cosines(side, backbones[side.name], key, counts)) for key in keys])
        for side in comparison.sides
    }

    def figure(name: str, place: int, kind: int) -> Figure:
        """``place``: stored values, or PCA with so many components; ``kind``: mean or worst percentile."""
        values = {side: _counts(own[:, place, kind]) for side, own in found.items()}
        return Figure(name, values, share, digits=4)

    def draw(unit: int) -> list[Panel]:
        grid = comparison.grid(keys[unit])
        panels = [photograph(comparison, keys[unit], grid)]
        for side in comparison.sides:
            loss = 1 - _cosines(side, backbones[side.name], keys[unit], counts)[0]
            panels.append(of_cells(side.name, loss, _LOSS_SHOWN))
        return panels

    return Outcome(
        protocol=(
            f"Cosine between the backbone's features of {counted(len(keys), 'image')} and those reconstructed from "
            "components, before upsampling: on average over an image's cells, and in their worst percentile. Stored: "
            "all components, quantized as in the store. With N components: PCA alone. Upsamplers make no difference. "
            f"Pictures: 1 − cosine, from 0 (dark) to {_LOSS_SHOWN} (bright)."
        ),
        unit="image",
        units=keys,
        figures=[
            figure("stored", 0, 0),
            figure("stored, worst percentile", 0, 1),
            *(figure(f"{count} components", place, 0) for place, count in enumerate(counts, 1)),
        ],
        draw=draw,
    )


def _cosines(side: Side, backbone: Backbone, key: str, counts: Sequence[int]) -> Tensor:
    """Cosine of each cell [1 + counts, h, w]: as stored, and with so many components; NaN in the padding."""
    row = side.store.row_of(key)
    mean, basis = torch.from_numpy(side.store.mean), torch.from_numpy(side.components)
    with torch.inference_mode():
        features = backbone(torch.from_numpy(read_photo(side.store, row))[None])
        centred = features - mean[:, None, None]
        components = torch.einsum("bchw,kc->bkhw", centred, basis)
        step = None if side.store.step is None else side.store.step[: len(basis)]
        codes = Encoding.of_steps(step, components.device).encode(components).codes.float()
        stored = codes if step is None else codes * torch.from_numpy(step)[:, None, None]
        parts = [stored, *(components[:, :count] for count in counts)]
        cosines = [
            F.cosine_similarity(
                torch.einsum("bkhw,kc->bchw", one, basis[: one.shape[1]]) + mean[:, None, None], features
            )
            for one in parts
        ]
    return torch.cat(cosines).where(on_image(side.store, key, backbone.grid), torch.nan)


def _counts(values: Tensor) -> Tensor:
    """Values of the images [P] and 1, or 0 and 0 of an image without a cell: [1, P, 2]."""
    known = ~values.isnan()
    return torch.stack([values.where(known, 0), known.float()], 1)[None]


def _figures(cosines: Tensor) -> Tensor:
    """Mean and worst percentile of cosines [n, h, w] over the cells: [n, 2]; NaN if all cells are padding."""
    flat = cosines.flatten(1)
    return torch.stack([flat.nanmean(1), flat.nanquantile(_WORST, 1)], 1)
