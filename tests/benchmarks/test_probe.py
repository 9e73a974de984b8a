"""The probe's counts and figures, on features of which the right answers are known."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.upsamplers import probe
from benchmarks.upsamplers.probe import CLASSES, Draws, Photo


def photo(seed: int) -> Photo:
    """An image whose red channel is its class, in blocks of 28 pixels, with an ignored corner."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, CLASSES, (8, 8), generator=generator).repeat_interleave(28, 0).repeat_interleave(28, 1)
    classes = blocks.clone()
    classes[:40, :40] = -1
    return blocks.to(torch.uint8).expand(1, 3, -1, -1), classes


def one_hot(image: torch.Tensor) -> torch.Tensor:
    """The best possible features: [1, classes, H, W]."""
    return F.one_hot(image[:, 0].long(), CLASSES).permute(0, 3, 1, 2).half()


def test_mean_iou_is_that_of_its_definition() -> None:
    confusion = torch.zeros(1, 3, 3, dtype=torch.float64)
    confusion[0, 0] = torch.tensor([6, 2, 0])
    confusion[0, 1] = torch.tensor([1, 3, 4])  # nothing is of class 2: what is taken for it counts as wrong elsewhere
    assert probe.mean_iou(confusion).tolist() == pytest.approx([(6 / 9 + 3 / 10) / 2])
    assert probe.accuracy(confusion).tolist() == pytest.approx([9 / 16])


def test_perfect_features_are_classified_perfectly() -> None:
    train, val = [photo(seed) for seed in range(4)], [photo(seed) for seed in range(4, 6)]
    with torch.inference_mode():
        classifiers = probe.trained(one_hot, train, Draws(2, len(train)))
        confusion, border = probe.evaluated(one_hot, classifiers, val)
    assert confusion.shape == (2, 2, CLASSES, CLASSES)
    assert border.shape == (2, 2, 2)
    assert confusion.sum((2, 3)).tolist() == [[224 * 224 - 40 * 40] * 2] * 2
    assert probe.mean_iou(confusion.sum(1).double()).tolist() == [1, 1]
    assert (border[..., 0] == border[..., 1]).all()
    assert 0 < border[0, 0, 1] < 224 * 224


def test_each_classifier_is_evaluated_as_itself() -> None:
    """Many classifiers at once count as each would alone."""
    generator = torch.Generator().manual_seed(0)
    classifiers = [torch.nn.Linear(CLASSES, CLASSES) for _ in range(3)]
    val = [photo(1), photo(2)]
    with torch.inference_mode():
        for classifier in classifiers:
            classifier.weight.copy_(torch.randn(CLASSES, CLASSES, generator=generator))
        confusion, border = probe.evaluated(one_hot, classifiers, val)
        for run, classifier in enumerate(classifiers):
            for number, (image, classes) in enumerate(val):
                predicted = classifier(one_hot(image)[0].float().permute(1, 2, 0)).argmax(2)
                known = classes >= 0
                expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
                expected.index_put_((classes[known], predicted[known]), torch.tensor(1), accumulate=True)
                assert torch.equal(confusion[run, number], expected)
                edge = known & probe.near_borders(classes)
                assert border[run, number].tolist() == [int((predicted == classes)[edge].sum()), int(edge.sum())]


def test_runs_draw_photographs_again() -> None:
    draws = Draws(5, 30)
    assert draws.photos.shape == (5, 30)
    assert all(10 < len(set(run)) < 30 for run in draws.photos.tolist())
    assert len({tuple(run) for run in draws.photos.tolist()}) == 5
