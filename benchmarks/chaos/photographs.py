"""The images of a chaos run: crops of scikit-image's pictures, and files among them that cannot be images."""

import io
import random
from dataclasses import dataclass
from pathlib import Path

from pipeline.images.sample import sample_rows

__all__ = ["PCA_IMAGES", "Photographs", "make_photographs"]

PCA_IMAGES = 64
_PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
_MARKER = b"\0this image crashes its decoder\0"  # of poison/sitecustomize.py
_CORRUPT_SHARE, _BROKEN_HEADER = 0.05, 16


@dataclass(frozen=True)
class Photographs:
    """Files by name, in the order of the store's rows.

    Attributes:
        files: of the job that is disturbed.
        undisturbed: of the reference: at the place of poison a file of the same length that cannot be decoded. A
            reference with poison would need a job that survives it, which is what is to be shown.
        poison: rows whose image crashes the decoder.
        corrupt: kind of damage by row.
    """

    files: dict[str, bytes]
    undisturbed: dict[str, bytes]
    poison: tuple[int, ...]
    corrupt: dict[int, str]


def make_photographs(count: int, *, poison: int, corrupt: bool, seed: int) -> Photographs:
    """Make ``count`` files.

    Poison lies where neither the basis nor the quantization is fitted: a part of those samples that is tried again
    image by image is summed in another order, and the last bits of the sums may differ.
    """
    chance = random.Random(seed)
    images = [_crop(i) for i in range(count)]
    sampled = set(sample_rows(count, 2 * PCA_IMAGES))  # twice: unusable images are replaced by the next of the sample
    free = [row for row in range(count) if row not in sampled]
    poisoned = sorted(chance.sample(free, poison))
    others = [row for row in range(count) if row not in poisoned]
    damaged = sorted(chance.sample(others, round(_CORRUPT_SHARE * count))) if corrupt else []
    kinds = {row: list(_DAMAGES)[i % len(_DAMAGES)] for i, row in enumerate(damaged)}
    for row, kind in kinds.items():
        images[row] = _DAMAGES[kind](images[row], chance)
    undisturbed = {f"{row:05}.jpg": image for row, image in enumerate(images)}
    files = dict(undisturbed)
    for row in poisoned:
        name, data = f"{row:05}.jpg", images[row] + _MARKER
        files[name], undisturbed[name] = data, bytes(_BROKEN_HEADER) + data[_BROKEN_HEADER:]
    return Photographs(files, undisturbed, tuple(poisoned), kinds)


def _crop(number: int) -> bytes:
    import skimage
    from PIL import Image

    with Image.open(Path(skimage.__file__).parent / "data" / _PICTURES[number % len(_PICTURES)]) as picture:
        left, top = (7 * number) % (picture.width - 128), (5 * number) % (picture.height - 128)
        buffer = io.BytesIO()
        picture.convert("RGB").crop((left, top, left + 128, top + 96 + number % 32)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _flipped(image: bytes, chance: random.Random) -> bytes:
    """A few bits of the header are others."""
    damaged = bytearray(image)
    for _ in range(4):
        damaged[chance.randrange(200)] ^= 1 << chance.randrange(8)
    return bytes(damaged)


_DAMAGES = {
    "truncated": lambda image, chance: image[: len(image) // 3],
    "random bytes": lambda image, chance: chance.randbytes(len(image)),
    "bits of the header": _flipped,
    "empty": lambda image, chance: b"",
    "text": lambda image, chance: b"This was to be an image, but is a page that says so.\n" * 20,
}
