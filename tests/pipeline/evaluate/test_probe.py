"""Linear probes and their figures: compared with scikit-learn, torchmetrics, and counts made by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from pipeline.evaluate import probe

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


def features(n: int = 600, k: int = 6) -> torch.Tensor:
    """Components of very different scales, as those of a PCA are."""
    return torch.randn(n, k) * torch.logspace(1, -1, k) + torch.arange(k)


def classes_of(x: torch.Tensor) -> torch.Tensor:
    """Three classes that overlap."""
    scores = (x - x.mean(0)) / x.std(0) @ torch.randn(x.shape[1], 3) + torch.randn(len(x), 3)
    return scores.argmax(1)


def test_the_classifier_is_scikit_learns() -> None:
    x = features()
    y = classes_of(x)
    fitted = probe.fit_classifier(x, y, 3)
    scaled = ((x - x.mean(0)) / x.std(0)).double().numpy()
    strength = 1 / (2 * len(x) * probe.WEIGHT_DECAY)
    expected = LogisticRegression(C=strength, max_iter=1000, tol=1e-10).fit(scaled, y.numpy()).predict_proba(scaled)
    assert np.abs(F.softmax(fitted(x), 1).numpy() - expected).max() < 5e-3


def test_the_regression_is_scikit_learns() -> None:
    x = features()
    y = (x @ torch.randn(x.shape[1])).double() + 3
    fitted = probe.fit_regression(x, y)
    scaled = ((x - x.mean(0)) / x.std(0)).double().numpy()
    expected = Ridge(alpha=len(x) * probe.WEIGHT_DECAY).fit(scaled, y.numpy()).predict(scaled)
    assert fitted(x)[:, 0].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_a_constant_component_changes_nothing() -> None:
    x = features()
    y = classes_of(x)
    with_constant = torch.cat([x, torch.full((len(x), 1), 7.0)], 1)
    plain, more = probe.fit_classifier(x, y, 3), probe.fit_classifier(with_constant, y, 3)
    assert torch.allclose(plain(x), more(with_constant), atol=1e-3)
    depth = x[:, 0].double()
    assert torch.allclose(
        probe.fit_regression(x, depth)(x), probe.fit_regression(with_constant, depth)(with_constant), atol=1e-3
    )


def test_figures_are_torchmetrics() -> None:
    """Class 4 is neither labelled nor predicted, class 3 is predicted only: neither counts."""
    truth, predicted = torch.randint(0, 3, (5000,)), torch.randint(0, 4, (5000,))
    predicted[:2500] = truth[:2500]
    counts = probe.class_counts(predicted, truth, 5)[None].double()
    per_class = multiclass_jaccard_index(predicted, truth, 5, average="none")
    assert float(probe.mean_iou(counts)) == pytest.approx(float(per_class[:3].mean()), abs=1e-6)
    expected = multiclass_accuracy(predicted, truth, 5, average="micro")
    assert float(probe.accuracy(counts)) == pytest.approx(float(expected), abs=1e-6)


def test_mean_iou_is_that_of_its_definition() -> None:
    truth = torch.tensor([0] * 8 + [1] * 8)
    predicted = torch.tensor([0] * 6 + [1] * 2 + [0] * 1 + [1] * 3 + [2] * 4)
    counts = probe.class_counts(predicted, truth, 3)
    assert counts.tolist() == [[6, 8, 7], [3, 8, 5], [0, 0, 4]]
    assert probe.mean_iou(counts[None].double()).tolist() == pytest.approx([(6 / 9 + 3 / 10) / 2])
    assert probe.accuracy(counts[None].double()).tolist() == pytest.approx([9 / 16])


def test_pixels_near_a_border() -> None:
    classes = torch.zeros(7, 12, dtype=torch.int64)
    classes[:, 6:] = 1
    near = probe.near_borders(classes, 2)
    assert near.all(0).tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert near.any(0).tolist() == near.all(0).tolist()
    assert not probe.near_borders(torch.zeros(7, 12, dtype=torch.int64), 2).any()


def test_runs_draw_images_again_and_only_labelled_pixels() -> None:
    draws = probe.Draws(5, 30, 40, seed=0)
    assert all(10 < len(set(run)) < 30 for run in draws.images.tolist())
    assert len({tuple(run) for run in draws.images.tolist()}) == 5
    labelled = torch.tensor([3, 17, 200])
    chosen = draws.pixels(4, labelled)
    assert chosen.shape == (5, 40)
    assert set(chosen.flatten().tolist()) == {3, 17, 200}
    assert torch.equal(chosen, probe.Draws(5, 30, 40, seed=0).pixels(4, labelled))
    assert not torch.equal(chosen, probe.Draws(5, 30, 40, seed=1).pixels(4, labelled))
    assert draws.pixels(0, labelled[:0]).shape == (5, 0)
