"""The report: table, JSON, and the page in a browser."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright

from pipeline.evaluate.probe import share
from pipeline.evaluate.report.page import page
from pipeline.evaluate.report.pictures import class_colour, class_colours, overlaid, photograph, ramp_colours
from pipeline.evaluate.report.result import Result
from pipeline.evaluate.task import Figure, Outcome, Panel
from tests.densefeat.page.serving import CHROMIUM, NEEDS_CHROMIUM
from tests.pipeline.evaluate.stores import compared, store_of

# Hits of ten: unit 0 is the worst, 3 the best, 2 differs most; of 4 nothing is known.
HITS = {"base <b>": [1, 5, 2, 8, 0], "better": [2, 6, 9, 9, 0]}
TRIALS = [10, 10, 10, 10, 0]


@pytest.fixture
def result(tmp_path: Path) -> Result:
    counts = {side: torch.tensor([own, TRIALS]).T[None] for side, own in HITS.items()}

    def draw(unit: int) -> list[Panel]:
        noise = np.random.default_rng(unit).integers(0, 256, (30, 40, 3)).astype(np.uint8)
        flat = np.full((30, 40, 3), 50 * unit, np.uint8)
        return [Panel(f"unit & {unit}", noise), *(Panel(side, flat) for side in HITS)]

    outcome = Outcome(
        "A protocol.", "image", [f"u{i}" for i in range(5)],
        [Figure("hits", counts, share), Figure("misses", counts, lambda c: 1 - share(c), False, 2)], draw,
    )  # fmt: skip
    store = store_of(tmp_path / "a", {"x": np.ones((2, 4, 4))})
    comparison = compared(**dict.fromkeys(HITS, store))
    comparison.notes.append("3 images have no labels: left out (<script>)")
    return Result.of("segmentation", outcome, comparison)


def test_the_table(result: Result) -> None:
    headings, cells = result.table()
    assert headings == ["features", "hits", "− base <b>", "misses ↓", "− base <b>", "s per image"]
    assert cells[0][0] == "base <b>"
    assert cells[0][1].startswith("0.400 ± ")
    assert cells[0][2] == ""
    assert cells[1][2].startswith("+0.250 (+0.")
    assert cells[1][2].endswith("*")  # better in every image, so also in every resample
    assert cells[1][4].startswith("−0.25 (−0.")
    text = result.describe()
    assert "note: 3 images have no labels" in text
    assert "note: the intervals resample 5 images: with so few they are too narrow" in text
    assert all(cell in text for line in cells for cell in line)


def test_the_json(result: Result) -> None:
    document = json.loads(json.dumps(result.to_dict({"runs": 2}), allow_nan=False))
    assert document["figures"]["hits"]["sides"]["better"]["value"]["mean"] == 0.65
    assert document["figures"]["misses"]["higher_is_better"] is False
    assert document["units"][2] == {"name": "u2", "hits": {"base <b>": 0.2, "better": 0.9}}
    assert document["units"][4] == {"name": "u4", "hits": {"base <b>": None, "better": None}}
    assert document["sides"][0]["configuration"]["upsampler"] == {"name": "bilinear"}


def outcome_of(counts: dict[str, list[list[int]]], runs: int = 1) -> Outcome:
    figure = Figure("hits", {side: torch.tensor([own] * runs) for side, own in counts.items()}, share)
    units = [f"u{i}" for i in range(len(next(iter(counts.values()))))]
    return Outcome("A protocol.", "image", units, [figure], lambda unit: [])


def test_one_unit_has_no_interval(tmp_path: Path) -> None:
    comparison = compared(**dict.fromkeys("ab", store_of(tmp_path / "a", {"x": np.ones((2, 4, 4))})))
    result = Result.of("segmentation", outcome_of({"a": [[1, 10]], "b": [[3, 10]]}), comparison)
    assert result.table()[1] == [["a", "0.100", "", ""], ["b", "0.300", "+0.200", ""]]
    text = result.describe()
    assert "note: there is one image: no intervals" in text
    assert "±" not in text
    assert "interval," not in text


def test_a_figure_that_no_unit_has(tmp_path: Path) -> None:
    comparison = compared(**dict.fromkeys("ab", store_of(tmp_path / "a", {"x": np.ones((2, 4, 4))})))
    nothing = [[0, 0], [0, 0]]
    result = Result.of("segmentation", outcome_of({"a": nothing, "b": nothing}, runs=2), comparison)
    assert result.table()[1] == [["a", "none", "", ""], ["b", "none", "", ""]]
    assert "note: hits: 2 of 2 images have nothing to count" in result.describe()
    document = json.loads(json.dumps(result.to_dict({}), allow_nan=False))
    assert document["figures"]["hits"]["sides"]["b"]["value"] == {"mean": None, "low": None, "high": None}


def test_equals_have_no_sign_and_one_side_no_differences(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", {"x": np.ones((2, 4, 4))})
    counts = [[1, 10], [5, 10]]
    both = Result.of("segmentation", outcome_of({"a": counts, "b": counts}, 2), compared(a=store, b=store))
    assert both.table()[1][1][2] == "0.000 (0.000 to 0.000)"
    assert "over 2 images and the runs; differences to a" in both.explained()
    alone = Result.of("segmentation", outcome_of({"a": counts}), compared(a=store))
    assert alone.table()[0] == ["features", "hits", "s per image"]
    assert "over 2 images. s per image" in alone.explained()


@NEEDS_CHROMIUM
def test_the_page_in_a_browser(result: Result, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page(result, shown=1))
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        opened = chromium.new_page(viewport={"width": 700, "height": 600})
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto((tmp_path / "report.html").as_uri())
        assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
        assert opened.locator("h2").all_inner_texts() == [
            "Notes", "Figures", "Worst images", "Best images", "Where better and base <b> differ most"
        ]  # fmt: skip
        captions = opened.locator("figcaption").all_inner_texts()
        assert captions[:3] == ["unit & 0", "base <b>: hits 0.100", "better: hits 0.200"]
        assert captions[3::3] == ["unit & 3", "unit & 2"]
        assert opened.evaluate("[...document.images].every(image => image.naturalWidth == 40)")
        assert opened.locator("td").first.inner_text() == "base <b>"
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")  # a wide table scrolls by itself
        chromium.close()


def test_the_colours_of_the_pictures_are_named(result: Result) -> None:
    named = replace(result.outcome, legend={"7": (1, 2, 3), "<b>": class_colour(1)})
    drawn = page(replace(result, outcome=named), shown=1)
    assert '<span><i style="background: rgb(1, 2, 3)"></i>7</span>' in drawn
    assert "&lt;b&gt;</span>" in drawn
    assert "Colours of" not in page(result, shown=1)
    table = class_colours(torch.tensor([[0, 1]]))
    assert tuple(table[0, 1].tolist()) == class_colour(1)


def test_no_pictures_if_none_are_wanted(result: Result) -> None:
    assert "<img" not in page(result, shown=0)
    assert page(result, shown=2).count("<img") == 3 * 2 * 3


def test_colours() -> None:
    colours = class_colours(torch.tensor([[-1, 0, 1, 2]]))
    assert len({tuple(colour) for colour in colours[0].tolist()}) == 4
    assert class_colours(torch.full((2, 2), -1)).std() == 0
    ramp = ramp_colours(np.array([[0.0, 5.0, 10.0, 20.0, np.nan]]), 0, 10)
    assert ramp[0, 0].tolist() == [68, 1, 84]
    assert ramp[0, 2].tolist() == ramp[0, 3].tolist() == [253, 231, 37]
    assert ramp[0, 4].tolist() == [40, 40, 40]
    photo = np.full((1, 2, 3), 100, np.uint8)
    assert overlaid(Panel("x", photo), torch.tensor([[0, 1]]))[0, 0].tolist() == [100, 100, 100]


def test_a_photograph_that_is_gone_is_grey_and_says_so(tmp_path: Path) -> None:
    comparison = compared(a=store_of(tmp_path / "a", {"x.jpg": np.ones((2, 4, 6))}))
    panel = photograph(comparison, "x.jpg", comparison.grid("x.jpg"))
    assert "cannot be read from" in panel.caption
    assert panel.pixels.shape == (4, 6, 3)
