"""The HTTP interface: the page's files, JSON, pictures, and heat maps as raw bytes. All requests are GET."""

import logging
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from densefeat.errors import DensefeatError, MissingFeatures, StorageUnavailable
from densefeat.page import listing
from densefeat.page.arguments import integer, row_number, selection, text_vector
from densefeat.page.cache import ByteCache
from densefeat.page.features import component_picture, encoded, segment_colours, segments
from densefeat.page.guard import Guard
from densefeat.page.library import Library, Shown
from densefeat.page.photographs import PhotographMissing, Photographs, from_guidance
from densefeat.page.sample import Match
from densefeat.rows.retired import RETIRED
from densefeat.similarity import Directions, NamedVectors

__all__ = ["build_app"]

logger = logging.getLogger(__name__)

_STATIC = Path(__file__).parent / "static"
_PICTURES_BYTES = 128 << 20
_KEPT = {"Cache-Control": "private, max-age=600"}
_PAGE_ROWS = 96


class Page:
    """The endpoints of one store.

    Args:
        library: the store.
        photographs: reads its photographs.
        texts: embeddings of texts that images can be compared with, if any.
    """

    def __init__(self, library: Library, photographs: Photographs, texts: NamedVectors | None = None) -> None:
        self.library = library
        self.photographs = photographs
        self.texts = texts
        self._pictures: ByteCache[bytes] = ByteCache(_PICTURES_BYTES, len)
        self._version = secrets.token_hex(4)  # another page may have had this address before

    def store(self, request: Request) -> Response:
        """What the store is, and how many rows it has by status and label.

        ``version`` goes into the addresses of all that browsers keep; ``problem`` says why the store, while it is being
        made, cannot be read any more; ``unread_shards``: finished ones whose records are still to be read; ``texts``:
        the names that `heat` takes.
        """
        shown = self.library.shown()
        k, height, width = shown.store.shape
        facts = {"uri": shown.store.uri, "rows": len(shown.store), "finished": shown.finished, **shown.counts}
        facts |= {"k": k, "height": height, "width": width, "dtype": shown.store.layout.dtype}
        facts["texts"] = self.texts.names if self.texts else ()
        version = f"{self._version}.{self.library.generation}"
        unread = shown.ledger.unread if shown.ledger else 0
        return JSONResponse({**facts, "version": version, "problem": self.library.problem, "unread_shards": unread})

    def rows(self, request: Request) -> Response:
        """One page of the rows that match ``q``, ``status`` and ``label``."""
        shown, query = self.library.shown(), request.query_params
        label = integer(request, "label", None, -(2**63), 2**63 - 1) if query.get("label") else None
        found = shown.rows(query.get("q", ""), query.get("status", ""), label)
        limit = integer(request, "limit", _PAGE_ROWS, 1, 500) or _PAGE_ROWS
        offset = integer(request, "offset", 0, 0, 2**62) or 0
        page = listing.records(shown.store.index, found[offset : offset + limit], shown.class_names)
        return JSONResponse({"total": len(found), "offset": offset, "rows": page})

    def image(self, request: Request) -> Response:
        """All that the index has about a row, and its neighbours with features."""
        shown, row = self._row(request)
        ok = shown.features.ok_rows
        before, after = ok[ok < row], ok[ok > row]
        neighbours = {
            "previous": int(before[-1]) if len(before) else None,
            "next": int(after[0]) if len(after) else None,
        }
        return JSONResponse({**listing.record(shown.store.index, row, shown.class_names), **neighbours})

    def photograph(self, request: Request) -> Response:
        """The photograph on the grid of its features; ``size``: pixels of its longer side.

        If it is missing, a compact store's guidance image, which has the resolution of the backbone's input.
        """
        shown, row = self._row(request)
        size = integer(request, "size", 448, 16, 1024) or 448

        def make() -> bytes:
            record = listing.record(shown.store.index, row, shown.class_names)
            if record["status"] == RETIRED:
                raise PhotographMissing(f"{record['key']} is retired: {record['error']}")
            _, height, width = shown.store.shape
            try:
                picture = self.photographs.read(record, (height, width), size)
            except PhotographMissing:
                if not shown.store.has_guidance or record["affine"] is None:
                    raise
                picture = from_guidance(shown.store.read_guidance(row), (height, width), size)
            return encoded(picture, "JPEG" if picture.mode == "RGB" else "PNG")

        return self._picture(("photograph", row, size), make)

    def colours(self, request: Request) -> Response:
        """The first three components in colours, PNG."""
        shown, row = self._row(request)
        return self._picture(("colours", row), lambda: encoded(shown.features.colours(row)))

    def component(self, request: Request) -> Response:
        """One component in colours, PNG."""
        shown, row = self._row(request)
        number = integer(request, "component", 0, 0, shown.store.shape[0] - 1) or 0
        deviation = float(np.sqrt(max(shown.store.array("pca/explained_variance")[number], 1e-12)))
        picture = partial(component_picture, shown.features.seen(row), number, deviation)
        return self._picture(("component", row, number), lambda: encoded(picture()))

    def segments(self, request: Request) -> Response:
        """Segments of similar features in their mean colours, PNG; ``count``: how many."""
        shown, row = self._row(request)
        count = integer(request, "count", 6, 2, 16) or 6

        def make() -> bytes:
            labels = segments(shown.features.seen(row), count)
            return encoded(segment_colours(labels, shown.features.colours(row)))

        return self._picture(("segments", row, count), make)

    def heat(self, request: Request) -> Response:
        """How similar each pixel of a row is to a text or a selection, as H·W bytes.

        For a selection in row ``from``: 255 × cosine, 0 if negative. For the text named ``text``: from 0 for the least
        cosine in the image to 255 for the greatest, which are in the header ``Heat-Range``; padding is 0.
        """
        shown, row = self._row(request)
        if (name := request.query_params.get("text")) is not None:
            return self._heat_of_text(shown, row, name)
        return _heat(shown.features.seen(row).cosines(self._query(request, shown)), 0, 1)

    def _heat_of_text(self, shown: Shown, row: int, name: str) -> Response:
        store = shown.store
        vector = text_vector(self.texts, name, len(store.mean))
        (cosines,), valid = shown.features.compared(row, Directions.of(vector, store.components, store.mean))
        inside = cosines[valid] if valid.any() else np.zeros(1, np.float32)
        low, high = float(inside.min()), float(inside.max())
        return _heat(np.where(valid, cosines, low), low, high)

    def similar(self, request: Request) -> Response:
        """Rows of the sample with places like a selection in row ``from``."""
        shown = self.library.shown()
        source, query = self._source(request, shown), self._query(request, shown)
        shown.sample.start()
        return self._matches(shown, lambda: shown.sample.like_region(query, without=source))

    def nearest(self, request: Request) -> Response:
        """Rows of the sample whose mean features are like those of a row."""
        shown, row = self._row(request)
        seen = shown.features.seen(row)
        shown.sample.start()
        shown.sample.add(row, seen)
        return self._matches(shown, lambda: shown.sample.like_image(seen, without=row))

    def figures(self, request: Request) -> Response:
        """The store in figures."""
        return JSONResponse(self.library.shown().figures)

    def _row(self, request: Request) -> tuple[Shown, int]:
        shown = self.library.shown()
        return shown, row_number(request.path_params["row"], len(shown.store))

    def _source(self, request: Request, shown: Shown) -> int:
        return row_number(request.query_params.get("from", ""), len(shown.store))

    def _query(self, request: Request, shown: Shown) -> Any:
        _, height, width = shown.store.shape
        seen = shown.features.seen(self._source(request, shown))
        return seen.at(selection(request, height, width))

    def _matches(self, shown: Shown, rank: Callable[[], list[Match]]) -> Response:
        # Before the ranking: "complete" promises that it has seen the whole sample.
        sample = {"images": len(shown.sample), "of": shown.sample.target, "complete": shown.sample.complete.is_set()}
        index = shown.store.index
        matches = [{**vars(match), "key": index["key"][match.row].as_py()} for match in rank()]
        return JSONResponse({"matches": matches, "sample": sample})

    def _picture(self, key: tuple[Any, ...], make: Callable[[], bytes]) -> Response:
        data = self._pictures.get((self.library.generation, *key), make)
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        return Response(data, media_type=kind, headers=_KEPT)


def build_app(
    store: str,
    *,
    images: str | None,
    texts: str | None,
    host: str,
    token: str | None,
    storage_options: dict[str, Any] | None,
) -> Starlette:
    """As `densefeat.page.create_app`, which checks the options."""
    library = Library(store, storage_options)
    source = library.shown().store.attributes["configuration"].get("source", {})
    page = Page(library, Photographs(source, images), _texts(texts, library.shown()))
    per_row = ("image", "photograph", "colours", "component", "segments", "heat", "nearest")
    routes: list[Route | Mount] = [Route(f"/api/{name}/{{row}}", getattr(page, name)) for name in per_row]
    routes += [Route(f"/api/{name}", getattr(page, name)) for name in ("store", "rows", "similar", "figures")]
    routes += [Route(path, _index) for path in ("/", "/image/{row}", "/figures")]
    routes.append(Mount("/static", StaticFiles(directory=_STATIC)))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, host=host, token=token)],
        exception_handlers={
            HTTPException: _http_error,
            MissingFeatures: partial(_error, 404),
            PhotographMissing: partial(_error, 404),
            StorageUnavailable: partial(_error, 503),
            DensefeatError: partial(_error, 500),
            OSError: partial(_error, 503),
        },
    )


def _texts(place: str | None, shown: Shown) -> NamedVectors | None:
    if place is None:
        return None
    texts, channels = NamedVectors.read(place), len(shown.store.mean)
    if texts.vectors.shape[1] != channels:
        raise ValueError(
            f"texts {place} have {texts.vectors.shape[1]} channels, the features of {shown.store.uri} {channels}: they "
            "are comparable only in the space of the text encoder's image encoder, a store made with --space head"
        )
    return texts


def _heat(values: npt.NDArray[np.float32], low: float, high: float) -> Response:
    """Values as bytes: 0 at and below ``low``, 255 at and above ``high``."""
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    body = (share * 255).round().astype(np.uint8).tobytes()
    headers = {**_KEPT, "Heat-Range": f"{low:.6g} {high:.6g}"}
    return Response(body, media_type="application/octet-stream", headers=headers)


async def _index(request: Request) -> Response:
    return FileResponse(_STATIC / "index.html", headers={"Cache-Control": "no-cache"})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, request, error, str(error.detail))


def _error(status: int, request: Request, error: Exception, text: str | None = None) -> Response:
    if status >= 500:
        logger.error("%s: %s", request.url.path, error)
    reason = {"error": text or str(error), "status": getattr(error, "status", None)}
    return JSONResponse(reason, status, headers={"Cache-Control": "no-store"})
