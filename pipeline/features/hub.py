"""The hub that timm downloads weights from, on machines that cannot reach it."""

import logging
import os
import socket
import urllib.request
from urllib.parse import urlsplit

__all__ = ["go_offline_if_unreachable"]

_logger = logging.getLogger(__name__)

_HUB = "https://huggingface.co"
_CONNECT_S = 5.0


def go_offline_if_unreachable() -> None:
    """Set HF_HUB_OFFLINE if no connection to the hub can be made: huggingface_hub would retry for a minute.

    Weights in its cache are still found. huggingface_hub reads the variable when it is imported, as timm does: call
    this first. A value that is set already, and a proxy, are left alone.
    """
    if "HF_HUB_OFFLINE" in os.environ or urllib.request.getproxies():
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or _HUB)
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        _logger.warning("%s cannot be reached (%s): using downloaded weights only", hub.netloc, error)
