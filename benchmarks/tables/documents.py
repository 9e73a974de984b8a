"""Tables within documents, between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.tables import chaos, evaluation, features, performance, reading, scale, stores, upsamplers

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

TABLES: dict[str, Callable[[], str]] = {
    "headline": performance.headline,
    "choice": evaluation.choice,
    "jbu_settings": upsamplers.jbu_settings,
    "held_out_of_jbu": upsamplers.held_out_of_jbu,
    "layers": features.layers,
    "components": features.components,
    "evaluation": evaluation.evaluation,
    "upsamplers": upsamplers.upsamplers,
    "upsampler_costs": upsamplers.upsampler_costs,
    "quality": upsamplers.quality,
    "quality_larger": upsamplers.quality_larger,
    "sizes": upsamplers.sizes,
    "fits": upsamplers.fits,
    "training": upsamplers.training,
    "encoding": stores.encoding,
    "chaos": chaos.chaos,
    "demo": performance.demo,
    "main_job": performance.main_job,
    "main_job_cores": performance.main_job_cores,
    "main_job_layers": performance.main_job_layers,
    "start": performance.start,
    "scale": scale.scale,
    "scale_limits": scale.scale_limits,
    "driver": scale.driver,
    "overhead": scale.overhead,
    "decode_elsewhere": scale.decode_elsewhere,
    "ray_data": scale.ray_data,
    "reader": performance.reader,
    "reading": reading.reading,
    "memory": reading.memory,
    "opening": reading.opening,
    "page": performance.page,
    "jbu_parts": performance.jbu_parts,
    "jbu": performance.jbu,
}

MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def names(text: str) -> list[str]:
    """Names of the tables in ``text``, in order."""
    return [mark[2] for mark in MARKED.finditer(text)]


def with_tables(text: str) -> str:
    """Regenerate the content between each table's marks in ``text``.

    Raises:
        KeyError: there is no table of that name.
    """
    return MARKED.sub(lambda mark: f"{mark[1]}{TABLES[mark[2]]()}\n{mark[3]}", text)
