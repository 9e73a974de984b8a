"""File names: the kind of data that a suffix implies, and escaping of names that are not UTF-8."""

import re
from pathlib import PurePosixPath

from schemas.configuration import SourceKind

__all__ = ["IMAGE_SUFFIXES", "KIND_OF", "escaped", "looks_like_image", "suffix_of", "unescaped"]


# In order of preference, for WebDataset samples with several images.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".avif", ".bmp",
    ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c", ".mpo",
)  # fmt: skip
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
KIND_OF: dict[str, SourceKind] = {
    **dict.fromkeys(IMAGE_SUFFIXES, "folder"),
    **dict.fromkeys((".tar", *_COMPRESSED_TARS), "tar"),
    ".parquet": "parquet",
    ".parq": "parquet",
}

# Unsupported image formats.
_OTHER_IMAGES = frozenset((
    ".heic", ".heif", ".hif", ".heics", ".avifs", ".jxl", ".jxr", ".wdp", ".hdp", ".jls", ".jng", ".mng", ".qoi",
    ".flif", ".bpg", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2", ".raf",
    ".pef", ".ptx", ".srw", ".x3f", ".raw", ".rwl", ".3fr", ".fff", ".iiq", ".mrw", ".kdc", ".dcr", ".erf", ".mef",
    ".mos", ".psd", ".psb", ".xcf", ".kra", ".exr", ".tga", ".icb", ".vda", ".vst", ".dds", ".ktx", ".ico", ".cur",
    ".icns", ".svg", ".svgz", ".eps", ".emf", ".wmf", ".pcx", ".pcd", ".sgi", ".ras", ".pam", ".pfm", ".xbm", ".xpm",
    ".dib", ".djvu", ".dcm", ".dicom", ".fits",
))  # fmt: skip
# "photo.jpg_large", "photo.png~", "photo.jpg.1": copies named by a browser, an editor or wget.
_COPY = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|jp2)([^0-9a-z./][^./]*|\.\d+)")
_BYTE = re.compile(r"[\udc80-\udcff]|\\(?=x[0-9a-f]{2})")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


def suffix_of(path: str) -> str:
    """Return the last suffix in lower case, with its dot; ``.tar.gz`` and similar count as one."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes[-2:]]
    return "".join(suffixes) if suffixes[:1] == [".tar"] else "".join(suffixes[-1:])


def looks_like_image(name: str) -> bool:
    """Whether a name without a suffix in ``IMAGE_SUFFIXES`` is an image's: an unsupported format, or a renamed copy."""
    return suffix_of(name) in _OTHER_IMAGES or bool(_COPY.search(name.lower().rpartition("/")[2][-300:]))


def escaped(name: str) -> str:
    r"""Escape a name as valid UTF-8: each byte that is not UTF-8 becomes ``\xHH``, as in ``caf\xe9.jpg``.

    A literal ``\xHH`` in a name has its backslash escaped (``\x5cxe9``), so that the mapping is one-to-one and
    ``unescaped`` inverts it. All other names are unchanged.

    Args:
        name: as returned by the operating system or tarfile, with surrogates for bytes that are not UTF-8.
    """
    return _BYTE.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", name)


def unescaped(name: str) -> str:
    """Invert `escaped`."""
    if "\\x" not in name:
        return name
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]).decode("utf-8", "surrogateescape"), name)
