"""Group member names into WebDataset samples, without losing images whose names contain dots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.images.listing.findings import Tally
from pipeline.images.listing.names import IMAGE_SUFFIXES, escaped, suffix_of

__all__ = ["Chosen", "choose_images", "label_names", "split_name"]

_FURTHER = "further images of a sample, of which only one is used"
_AMBIGUOUS = "images of samples with several, none of which is preferred: select the extension with --image-column"
_NOT_ASKED = "images with another extension than the requested one"


class Chosen(NamedTuple):
    """An image: its key, and the index of its name among all names."""

    key: str
    place: int


@dataclass
class _Sample:
    """Members of one folder whose names have the same stem."""

    plain: bool = False  # whether one of them has a plain extension
    images: list[tuple[str, int]] = field(default_factory=list)  # extension, index


def split_name(name: str) -> tuple[str, str]:
    """Split the path of a member into stem and extension.

    The name is split at its first dot, as in WebDataset (``a.seg.png`` → ``a``, ``seg.png``), unless a later part
    begins with a digit: extensions do not, so the stem extends through the last such part (``shot.0001.png`` →
    ``shot.0001``, ``png``; ``DJI_0.5x.left.png`` → ``DJI_0.5x``, ``left.png``).
    """
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    end = 1 + max((place for place in range(1, len(parts) - 1) if parts[place][:1].isdecimal()), default=0)
    return folder + slash + ".".join(parts[:end]), ".".join(parts[end:])


def label_names(name: str) -> Iterator[str]:
    """Possible names of an image's ``.cls`` member, without the suffix; the image's own name before its sample's."""
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        yield folder + slash + base


def choose_images(names: Sequence[str], asked: str | None, tally: Tally) -> list[Chosen]:
    """Choose the members that are the images of a dataset, in the order of the members.

    Members of one folder with the same stem (`split_name`) are a sample if one of them has a plain extension, without
    a dot (``a.cls``, ``a.png``). Its key is the stem, and one of its images is used: the one whose plain extension is
    first in ``IMAGE_SUFFIXES`` (``a.jpg`` before ``a.png``), or the only one (``a.left.png``). If there are several
    and none has a plain extension, the first is used and the rest are counted as lost. Members with the same stem and
    no plain extension among them (``St.Peter.jpg``, ``St.Paul.jpg``) are separate images; their key is the name
    without the suffix.

    Args:
        names: of the members that are files or links to one.
        asked: use the members with this extension, e.g. ``left.png``: everything after the first dot, or after the key.
        tally: counts every member with an image's name that is not chosen.
    """
    samples: dict[str, _Sample] = {}
    for index, name in enumerate(names):
        stem, extension = split_name(name)
        sample = samples.setdefault(stem, _Sample())
        sample.plain |= bool(extension) and "." not in extension
        if suffix_of(name) in IMAGE_SUFFIXES or (asked is not None and _after_first_dot(name) == asked.lower()):
            sample.images.append((extension.lower(), index))
    chosen: list[Chosen] = []
    for stem, sample in samples.items():
        if asked is not None:
            chosen += _asked(stem, sample, names, asked.lower(), tally)
        elif sample.plain:
            chosen += _one_of(stem, sample.images, names, tally)
        else:
            for key, images in _own_images(sample, names).items():
                chosen += _one_of(key, images, names, tally)
    return sorted(chosen, key=lambda image: image.place)


def _one_of(key: str, images: list[tuple[str, int]], names: Sequence[str], tally: Tally) -> list[Chosen]:
    if not images:
        return []
    best = min(images, key=_preference)  # the first if several are equal
    is_first_choice = "." not in best[0]
    for image in images:
        if image is not best:
            reason = _FURTHER if is_first_choice else _AMBIGUOUS
            tally.add("other" if is_first_choice else "image", reason, escaped(names[image[1]]))
    return [Chosen(key, best[1])]


def _asked(stem: str, sample: _Sample, names: Sequence[str], asked: str, tally: Tally) -> Iterator[Chosen]:
    keys: set[str] = set()
    for extension, index in sample.images:
        name = names[index]
        if _after_first_dot(name) == asked:
            key = name[: len(name) - len(asked) - 1]
        elif extension == asked:
            key = stem
        elif not sample.plain and suffix_of(name) == f".{asked}":
            key = name[: len(name) - len(asked) - 1]
        else:
            tally.add("other", _NOT_ASKED, escaped(name))
            continue
        if key in keys:  # "a.jpg" and "a.JPG"
            tally.add("other", _FURTHER, escaped(name))
            continue
        keys.add(key)
        yield Chosen(key, index)


def _own_images(sample: _Sample, names: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """Images by name without the suffix; the extension is only the suffix."""
    images: dict[str, list[tuple[str, int]]] = {}
    for _, index in sample.images:
        stem, _, suffix = names[index].rpartition(".")
        images.setdefault(stem, []).append((suffix.lower(), index))
    return images


def _after_first_dot(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _preference(image: tuple[str, int]) -> int:
    suffix = "." + image[0]
    return IMAGE_SUFFIXES.index(suffix) if suffix in IMAGE_SUFFIXES else len(IMAGE_SUFFIXES)
