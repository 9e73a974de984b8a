"""TIFF: which combinations of tags are supported, and which are refused."""

from enum import IntEnum
from typing import NamedTuple

from pipeline.errors import ImageError
from pipeline.images.decoding.tiff_tags import Directory, Tag, read_directory

__all__ = ["Alpha", "Compression", "Header", "Photometric", "read_header"]

_Values = dict[Tag, tuple[int, ...]]


class Compression(IntEnum):
    """Supported values of the Compression tag."""

    NONE = 1
    FAX_RLE = 2
    FAX3 = 3
    FAX4 = 4
    LZW = 5
    OLD_JPEG = 6
    JPEG = 7
    DEFLATE = 8
    PACKBITS = 32773
    OLD_DEFLATE = 32946
    LZMA = 34925
    ZSTD = 50000


class Photometric(IntEnum):
    """Supported values of the PhotometricInterpretation tag."""

    WHITE_IS_ZERO = 0
    BLACK_IS_ZERO = 1
    RGB = 2
    PALETTE = 3
    CMYK = 5
    YCBCR = 6


class Alpha(IntEnum):
    """Whether there is an alpha channel, and whether colours are premultiplied by it; values as in ExtraSamples."""

    NONE = 0
    ASSOCIATED = 1
    UNASSOCIATED = 2


# Number of colour channels; those after them are "extra samples".
_COLOUR_CHANNELS = {
    Photometric.WHITE_IS_ZERO: 1,
    Photometric.BLACK_IS_ZERO: 1,
    Photometric.PALETTE: 1,
    Photometric.RGB: 3,
    Photometric.YCBCR: 3,
    Photometric.CMYK: 4,
}
_IMAGE_CODECS = (Compression.FAX_RLE, Compression.FAX3, Compression.FAX4, Compression.JPEG, Compression.OLD_JPEG)
_COMPRESSIONS, _PHOTOMETRICS, _ALPHAS = (frozenset(kind) for kind in (Compression, Photometric, Alpha))
_BITS = (1, 2, 4, 8, 12, 16)
_MAX_CHANNELS = 16
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "float", 4: "undefined", 5: "complex signed", 6: "complex float"}
_PHOTOMETRIC_NAMES = {4: "a mask", 8: "CIE L*a*b*", 9: "ICC L*a*b*", 10: "ITU L*a*b*", 32803: "a colour filter array",
                      32844: "LogL", 32845: "LogLuv", 34892: "linear raw"}  # fmt: skip
_BT601 = (299, 587, 114)
_FULL_RANGE = (0, 255, 128, 255, 128, 255)


class Header(NamedTuple):
    """The checked header of the first image of a file: its combination of tags is supported.

    Attributes:
        directory: the tags.
        bits: per sample.
        channels: samples per pixel, including extra ones.
    """

    directory: Directory
    width: int
    height: int
    bits: int
    channels: int
    compression: Compression
    photometric: Photometric
    alpha: Alpha
    planar: bool

    @property
    def colour_channels(self) -> int:
        """Number of colour channels; an alpha channel follows them."""
        return _COLOUR_CHANNELS[self.photometric]

    @property
    def is_image_codec(self) -> bool:
        """Whether the compression works on pixels (JPEG, fax) rather than bytes."""
        return self.compression in _IMAGE_CODECS

    @property
    def tags(self) -> _Values:
        """Values of the tags."""
        return self.directory.values

    def value(self, tag: Tag, default: int) -> int:
        """The first value of ``tag``, or ``default`` if it is missing."""
        return self.tags.get(tag, (default,))[0]


def read_header(data: bytes) -> Header:
    """Read and check the first directory of a TIFF or BigTIFF.

    Raises:
        ImageError: ``corrupt``: tags are missing or contradict each other; ``unsupported``: the combination of tags
            has no defined colours, or cannot be decoded here.
        Exception: from struct or numpy, if the directory points outside the file.
    """
    directory = read_directory(data)
    tags = directory.values
    if Tag.WIDTH not in tags or Tag.HEIGHT not in tags:
        raise ImageError("corrupt", "Got a TIFF without a width or a height.")
    compression, photometric = _compression(tags), _photometric(tags)
    old_colour = compression == Compression.OLD_JPEG and photometric in (Photometric.RGB, Photometric.YCBCR)
    channels = tags.get(Tag.CHANNELS, (3 if old_colour else 1,))[0]
    header = Header(
        directory,
        width=tags[Tag.WIDTH][0],
        height=tags[Tag.HEIGHT][0],
        bits=_bits(tags, channels),
        channels=channels,
        compression=compression,
        photometric=photometric,
        alpha=_alpha(tags, photometric, channels),
        planar=tags.get(Tag.PLANAR, (1,))[0] == 2 and channels > 1,
    )
    _check_samples(header)
    if header.is_image_codec:
        _check_image_codec(header)
    return header


def _refuse(got: str, expected: str) -> ImageError:
    return ImageError("unsupported", f"Got a TIFF with {got}, expected {expected}.")


def _compression(tags: _Values) -> Compression:
    value = tags.get(Tag.COMPRESSION, (1,))[0]
    if value not in _COMPRESSIONS:
        raise _refuse(f"compression {value}", ", ".join(f"{member.name} ({member})" for member in Compression))
    return Compression(value)


def _photometric(tags: _Values) -> Photometric:
    if Tag.PHOTOMETRIC not in tags:
        raise _refuse("no PhotometricInterpretation", "one; without it, black and white may be swapped")
    value = tags[Tag.PHOTOMETRIC][0]
    if value not in _PHOTOMETRICS:
        name = _PHOTOMETRIC_NAMES.get(value, "unknown")
        known = ", ".join(f"{member.name} ({member})" for member in Photometric)
        raise _refuse(f"photometric interpretation {value} ({name})", known)
    return Photometric(value)


def _bits(tags: _Values, channels: int) -> int:
    if not 1 <= channels <= _MAX_CHANNELS:
        raise _refuse(f"{channels} samples per pixel", f"1 to {_MAX_CHANNELS}")
    bits = tags.get(Tag.BITS, (1,))[:channels]
    formats = tags.get(Tag.SAMPLE_FORMAT, (1,))[:channels]
    if set(formats) != {1}:
        names = ", ".join(_SAMPLE_FORMATS.get(value, str(value)) for value in dict.fromkeys(formats))
        raise _refuse(f"{bits[0]}-bit samples that are {names}", "unsigned ones; the range of others is not defined")
    if len(set(bits)) != 1 or len(bits) not in (1, channels) or bits[0] not in _BITS:
        raise _refuse(f"{bits} bits per sample", f"one of {', '.join(map(str, _BITS))}, equal for all {channels}")
    return bits[0]


def _alpha(tags: _Values, photometric: Photometric, channels: int) -> Alpha:
    colours = _COLOUR_CHANNELS[photometric]
    extra = tags.get(Tag.EXTRA_SAMPLES, ())
    if channels < colours:
        raise ImageError("corrupt", f"Got a TIFF with {channels} samples per pixel; {photometric.name} has {colours}.")
    if not extra and channels == 4 and photometric == Photometric.RGB:
        return Alpha.UNASSOCIATED  # writers that leave the tag out mean RGBA
    if len(extra) != channels - colours:
        raise _refuse(
            f"{channels} samples per pixel, {photometric.name} and {len(extra)} extra samples",
            "ExtraSamples for every further one",
        )
    alphas = [value for value in extra if value]
    if len(alphas) > 1 or (alphas and not extra[0]) or any(value not in _ALPHAS for value in alphas):
        raise _refuse(f"extra samples {extra}", "0 (ignored), or one alpha channel (1 or 2) right after the colour")
    alpha = Alpha(alphas[0]) if alphas else Alpha.NONE
    if alpha == Alpha.ASSOCIATED and photometric not in (Photometric.BLACK_IS_ZERO, Photometric.RGB):
        raise _refuse(f"{photometric.name} premultiplied by alpha", "premultiplied BLACK_IS_ZERO or RGB only")
    return alpha


def _check_samples(header: Header) -> None:
    tags, photometric = header.tags, header.photometric
    if header.value(Tag.PLANAR, 1) not in (1, 2) or header.value(Tag.FILL_ORDER, 1) not in (1, 2):
        raise _refuse("an unknown PlanarConfiguration or FillOrder", "1 or 2")
    if photometric == Photometric.PALETTE:
        colours = len(tags.get(Tag.COLOR_MAP, ())) // 3
        if colours != 1 << header.bits:
            raise _refuse(f"a palette of {colours} colours for {header.bits} bits", f"{1 << header.bits} colours")
    if photometric == Photometric.CMYK and header.value(Tag.INK_SET, 1) != 1:
        raise _refuse(f"InkSet {header.value(Tag.INK_SET, 1)}", "1: cyan, magenta, yellow, black")
    if photometric == Photometric.YCBCR and not header.is_image_codec:
        subsampling = tags.get(Tag.YCBCR_SUBSAMPLING, (2, 2))
        if header.bits != 8 or subsampling != (1, 1) or not _is_standard_ycbcr(tags):
            raise _refuse(
                f"YCbCr of {header.bits} bits, subsampled {subsampling}",
                "8 bits, not subsampled, full range and the standard coefficients; or JPEG",
            )


def _is_standard_ycbcr(tags: _Values) -> bool:
    """Whether YCbCr is as in JFIF: ITU-R BT.601, full range."""
    weights = tags.get(Tag.YCBCR_COEFFICIENTS, _BT601)
    range_ = tags.get(Tag.REFERENCE_BLACK_WHITE, _FULL_RANGE)
    return weights == _BT601 and range_ in (_FULL_RANGE, tuple(1000 * value for value in _FULL_RANGE))


def _check_image_codec(header: Header) -> None:
    """Refuse combinations with JPEG and fax that Pillow and libtiff do not decode correctly."""
    colour = (header.photometric, header.bits, header.channels)
    if header.compression in (Compression.JPEG, Compression.OLD_JPEG):
        allowed = [(Photometric.RGB, 8, 3), (Photometric.YCBCR, 8, 3)]
        if header.compression == Compression.JPEG:
            allowed += [(Photometric.BLACK_IS_ZERO, 8, 1), (Photometric.CMYK, 8, 4)]
    else:
        allowed = [(Photometric.WHITE_IS_ZERO, 1, 1), (Photometric.BLACK_IS_ZERO, 1, 1)]
    if header.directory.big and header.directory.order == ">":
        raise _refuse(f"a big-endian BigTIFF with compression {header.compression.name}", "classic TIFF")
    if colour not in allowed or header.planar:
        raise _refuse(
            f"{header.photometric.name} of {header.bits} bits, {header.channels} samples per pixel"
            f"{' in planes' if header.planar else ''}, and compression {header.compression.name}",
            " or ".join(f"{name.name} of {bits} bits, {channels} samples" for name, bits, channels in allowed),
        )
