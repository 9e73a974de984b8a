"""Class activation maps.

The measure of FeatUp (Fu et al., ICLR 2024): how well the map of a class shows where the classifier sees it. Average
drop and average increase are those of Grad-CAM++ (Chattopadhay et al., WACV 2018): the image is multiplied with the
map, stretched to 0 … 1, and the probability of the class compared with that for the whole image. Insertion and deletion
are those of RISE (Petsiuk et al., BMVC 2018): the area below the probability as the pixels are inserted into a blurred
image, or replaced by grey, those with the highest values first. The class is the classifier's own for the whole image.

The features must be class scores at every position, of ``--space head``: the map of a class is then a channel.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from pipeline.errors import JobError
from pipeline.evaluate.data.comparison import Comparison, counted, spread
from pipeline.evaluate.data.originals import backbone_of, check_weights, on_image, read_photo
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.evaluate.probe import share
from pipeline.evaluate.report.pictures import ramp_colours
from pipeline.evaluate.task import Figure, Outcome, Panel
from pipeline.features.backbone import Backbone
from schemas.evaluate_options import EvaluateConfig

__all__ = ["Classifier", "check", "evaluate", "measures"]

_OF_TEXTS = ("clip", "siglip")  # in timm's names of models trained with texts,
_TUNED = "_ft_"  # and of weights tuned to a classifier afterwards
_STEPS = 10  # of insertion and deletion
_GREY = 127.5
_BLUR = (11, 5.0)  # RISE: kernel and standard deviation in pixels


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of images."""

    backbone: Backbone

    def probabilities(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] uint8 -> [B, classes]."""
        logits: Tensor = self.backbone.model(self.backbone.normalise(images))
        return logits.softmax(1)


def check(config: EvaluateConfig, sides: Sequence[PlannedSide], keys: Sequence[str]) -> None:
    """Refuse features that are no class scores, and stores without the weights of their backbone.

    Raises:
        JobError: as described.
    """
    for side in sides:
        if side.configuration.backbone.get("space") != "head":
            raise JobError(f"--features {side.name}: expected class scores: make the features with --space head")
    check_weights(sides, config.weights)


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: the weights are not those that made a store, or an image cannot be read.
    """
    keys = spread(comparison.keys, config.limit)
    comparison.notes.extend(_doubts(comparison.sides))
    classifiers = {side.name: Classifier(backbone_of(side, config.weights)) for side in comparison.sides}
    found: dict[str, list[Tensor]] = {side.name: [] for side in comparison.sides}
    with torch.inference_mode():
        for key in keys:
            for side in comparison.sides:
                found[side.name].append(measures(classifiers[side.name], *_map(side, classifiers[side.name], key)))
    values = {side: torch.stack(own)[None] for side, own in found.items()}

    def figure(name: str, place: int, higher_is_better: bool) -> Figure:
        counts = {side: own[..., [place, -1]] for side, own in values.items()}
        return Figure(name, counts, share, higher_is_better)

    def draw(unit: int) -> list[Panel]:
        panels: list[Panel] = []
        with torch.inference_mode():
            for side in comparison.sides:
                photo, heat, number, _ = _map(side, classifiers[side.name], keys[unit])
                if not panels:
                    panels.append(Panel(f"{keys[unit]}, class {number}", photo.permute(1, 2, 0).numpy()))
                panels.append(Panel(side.name, ramp_colours(heat.double().numpy(), 0, 1)))
        return panels

    return Outcome(
        protocol=(
            f"Class activation maps of the classifier's own class, on {counted(len(keys), 'image')}. Average drop "
            "and increase of its probability if the image is multiplied with the map (Chattopadhay et al., Grad-CAM++, "
            "WACV 2018), as in FeatUp (Fu et al., ICLR 2024); areas below it for insertion and deletion (Petsiuk et "
            "al., RISE, BMVC 2018)."
        ),
        unit="image",
        units=keys,
        figures=[
            figure("average drop", 0, False),
            figure("average increase", 1, True),
            figure("insertion", 2, True),
            figure("deletion", 3, False),
        ],
        draw=draw,
    )


def _doubts(sides: Sequence[Side]) -> Iterator[str]:
    """Notes on sides whose channels may be no class scores: timm does not tell a projection from a classifier."""
    for side in sides:
        name = side.store.attributes["configuration"]["backbone"]["name"]
        if any(family in name for family in _OF_TEXTS) and _TUNED not in name:
            yield (
                f"{side.name}: {name} is trained with texts. If its head is the projection into their space, its "
                "channels are no class scores, and the figures mean nothing: use a classifier"
            )


def _map(side: Side, classifier: Classifier, key: str) -> tuple[Tensor, Tensor, int, Tensor]:
    """As for `measures`: photograph [3, H, W] uint8, map [H, W] of the most probable class, class, and pixels [H, W].

    The map is 0 … 1 on the image; padding does not count.
    """
    photo = torch.from_numpy(read_photo(side.store, side.store.row_of(key)))
    number = int(classifier.probabilities(photo[None])[0].argmax())
    components = torch.from_numpy(side.components[:, number].copy())
    scores = torch.einsum("k,khw->hw", components, side.read(key))
    large = F.interpolate(scores[None, None], photo.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    valid = on_image(side.store, key, (photo.shape[1], photo.shape[2]))
    inside = large[valid] if valid.any() else large
    low, high = inside.min(), inside.max()
    return photo, ((large - low) / (high - low).clamp(min=1e-12)).clamp(0, 1), number, valid


def measures(classifier: Classifier, photo: Tensor, heat: Tensor, number: int, valid: Tensor) -> Tensor:
    """Drop, increase, insertion and deletion of an image, and 1: [5] float64.

    Padding stays as it is in all of them; zeros if there is nothing else.

    Args:
        classifier: of images.
        photo: [3, H, W] uint8.
        heat: [H, W], 0 … 1.
        number: of the class.
        valid: [H, W] bool, pixels of the image; the others are padding.
    """
    if not valid.any():
        return torch.zeros(5, dtype=torch.float64)
    whole = photo.float()
    blurred = gaussian_blur(whole, [_BLUR[0]] * 2, [_BLUR[1]] * 2)
    order = heat[valid].argsort(descending=True, stable=True)
    rank = torch.full(heat.shape, -1)
    rank[valid] = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    before = [rank < len(order) * step / _STEPS for step in range(_STEPS + 1)]  # padding is before all pixels
    images = [whole, whole * heat.where(valid, 1)]
    images += [torch.where(top, whole, blurred) for top in before]
    images += [torch.where(top & valid, _GREY, whole) for top in before]
    stacked = torch.stack(images).round().clamp(0, 255).to(torch.uint8)
    full, masked, *rest = classifier.probabilities(stacked)[:, number].double().tolist()
    inserted, deleted = torch.tensor(rest, dtype=torch.float64).view(2, -1)
    areas = [float(torch.trapezoid(one, dx=1 / _STEPS)) for one in (inserted, deleted)]
    return torch.tensor([max(0.0, full - masked) / full, float(masked > full), *areas, 1.0], dtype=torch.float64)
