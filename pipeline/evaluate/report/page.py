"""The result as one HTML file: the table, and pictures of the images that tell most."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.evaluate.report.result import Result
from pipeline.evaluate.task import Panel

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; white-space: nowrap; }
tr { border-bottom: 1px solid #8884; }
.unit { display: flex; gap: .5rem; overflow-x: auto; margin-bottom: 1.2rem; }
figure { margin: 0; flex: none; width: 13rem; }
figure img { width: 100%; display: block; image-rendering: pixelated; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
li, p { max-width: 60rem; }
.legend span { display: inline-block; margin-right: .8rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
"""


def page(result: Result, shown: int) -> str:
    """Build the page; it needs no other files.

    Args:
        result: of the evaluation.
        shown: number of units in each section of pictures.
    """
    headings, cells = result.table()
    title = f"{result.task}: {', '.join(result.sides)}"
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.comparison.notes)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(result.task.capitalize())}</h1><p>{html.escape(result.outcome.protocol)}</p>",
            f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "",
            f'<h2>Figures</h2><div class="wide"><table><thead>{_headings(headings)}</thead><tbody>',
            *(_row(line) for line in cells),
            f"</tbody></table></div><p>{html.escape(result.explained())}</p>",
            _legend(result.outcome.legend) if shown else "",
            *(part for heading, units in _sections(result, shown) for part in _section(result, heading, units)),
            "</body></html>",
        ]
    )


def _legend(colours: Mapping[str, tuple[int, int, int]]) -> str:
    entries = (
        f'<span><i style="background: rgb{colour}"></i>{html.escape(name)}</span>' for name, colour in colours.items()
    )
    return f'<p class="legend">Colours of the pictures: {" ".join(entries)}</p>' if colours else ""


def _headings(headings: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<th>{html.escape(heading)}</th>' for heading in headings)}</tr>"


def _row(cells: Sequence[str]) -> str:
    name, *figures = cells
    return f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{_figure(figure)}</td>' for figure in figures)}</tr>"


def _figure(cell: str) -> str:
    """A figure; the interval of a difference comes below it, because the table is wide."""
    figure, parenthesis, interval = cell.partition(" (")
    return html.escape(figure) + (f"<br><small>({html.escape(interval)}</small>" if parenthesis else "")


def _sections(result: Result, shown: int) -> Iterator[tuple[str, list[int]]]:
    """Headings, and numbers of the units below them."""
    figure = result.outcome.figures[0]
    values = torch.stack([figure.of_units(side) for side in result.sides])
    quality = values if figure.higher_is_better else -values
    if shown:
        yield f"Worst {result.outcome.unit}s", _first(quality.mean(0), shown)
        yield f"Best {result.outcome.unit}s", _first(-quality.mean(0), shown)
    if shown and len(values) > 1:
        gain = (quality - quality[0])[1:]
        spread = torch.where(gain.isnan(), 0, gain).abs().flatten(1).mean(1)
        side = 1 + int(spread.argmax())
        heading = f"Where {result.sides[side]} and {result.sides[0]} differ most"
        yield heading, _first(-(quality[side] - quality[0]).abs(), shown)


def _first(values: Tensor, count: int) -> list[int]:
    """Places of the smallest values, NaN left out."""
    order = values.argsort(stable=True).tolist()
    return [place for place in order if not bool(values[place].isnan())][:count]


def _section(result: Result, heading: str, units: Sequence[int]) -> Iterator[str]:
    figure = result.outcome.figures[0]
    values = {side: figure.of_units(side) for side in result.sides}
    yield f"<h2>{html.escape(heading)}</h2>"
    for unit in units:
        yield '<div class="unit">'
        panels = result.outcome.draw(unit)
        names = [None] * (len(panels) - len(values)) + list(values)
        for panel, side in zip(panels, names, strict=True):
            caption = panel.caption
            if caption == side:
                caption += f": {figure.name} {float(values[side][unit]):.{figure.digits}f}"
            yield f"<figure>{_picture(panel)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        yield "</div>"


def _picture(panel: Panel) -> str:
    """A picture within the page: PNG for flat colours, JPEG for all else."""
    flat = len(np.unique(panel.pixels.reshape(-1, 3), axis=0)) <= 256
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(panel.pixels)).save(data, "PNG" if flat else "JPEG", quality=85)
    kind = "png" if flat else "jpeg"
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{html.escape(panel.caption)}" src="data:image/{kind};base64,{encoded}">'
