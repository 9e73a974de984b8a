"""Images encoded as text: a ``data:`` URI, or base64."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

__all__ = ["inline_image", "is_inline_image"]

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")
_HEAD = 64  # characters decoded to detect an image
_SHORTEST = 40  # characters; the smallest images have about 30 bytes
_FIRST_BYTES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|P[1-6]\s"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftypavi[fs]",
    re.DOTALL,
)


def is_inline_image(text: str) -> bool:
    """Whether a text is an image rather than the path or URI of one.

    True for a ``data:`` URI, or base64 (either alphabet) of bytes that begin like an image. A path with a suffix is
    never base64, which has no dot.
    """
    if text[:5].lower() == "data:":
        return True
    if len(text) < _SHORTEST or not _BASE64.fullmatch(text):
        return False
    try:
        return _FIRST_BYTES.match(_decoded(text[:_HEAD])) is not None
    except ValueError:
        return False


def inline_image(text: str) -> bytes:
    """Decode a text for which `is_inline_image` is true.

    Raises:
        ValueError: the text is not valid base64.
    """
    if text[:5].lower() == "data:":
        header, _, data = text.partition(",")
        if not header.lower().rstrip().endswith(";base64"):
            return unquote_to_bytes(data)
        text = unquote_to_bytes(data).decode("ascii", "replace") if "%" in data else data
    return _decoded(text)


def _decoded(text: str) -> bytes:
    plain = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not valid base64: {error}") from error
