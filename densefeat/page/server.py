"""Start the page: options, token, address. Starlette and uvicorn are imported when they are needed."""

import contextlib
import ipaddress
import secrets
import socket
import sys
from typing import TYPE_CHECKING, Any

from densefeat.errors import missing_package

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["create_app", "serve"]

_LOOPBACK_NAMES = ("localhost", "localhost.")


def create_app(
    store: str,
    *,
    images: str | None = None,
    texts: str | None = None,
    host: str = "127.0.0.1",
    token: str | None = None,
    storage_options: dict[str, Any] | None = None,
) -> "Starlette":
    """Make the ASGI application of a store.

    Args:
        store: folder or URI of the store; it may be unfinished.
        images: folder or URI with the photographs, each at its key. None: each row's URI in the index.
        texts: path or URI of an .npz file with embeddings of texts, to be compared with images
            (`densefeat.similarity.NamedVectors`).
        host: the address that the server listens on; it decides which Host headers are accepted.
        token: if given, each request must carry it, as ``?token=``, bearer token or cookie.
        storage_options: for the file system of the store, passed to fsspec.

    Raises:
        MissingPackage: the packages of the extra ``page`` are missing.
        StoreError, OSError: as for ``densefeat.FeatureStore``.
        DensefeatError, OSError: the file of texts is damaged, or cannot be read.
        ValueError: the texts have another number of channels than the features; ``host`` is not a loopback address, and
            there is no token; or the token is empty.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"host {host!r} can be reached from other machines: give a token")
    if token is not None and not token.strip():
        raise ValueError("the token is empty: give one that cannot be guessed, or none for a random one")
    try:
        from densefeat.page.app import build_app
    except ImportError as error:
        raise missing_package("the page", error.name or "a package", "page") from error
    return build_app(store, images=images, texts=texts, host=host, token=token, storage_options=storage_options)


def serve(
    store: str,
    *,
    images: str | None = None,
    texts: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
) -> None:
    """Serve the page of a store until interrupted. Prints its address.

    Args:
        store: folder or URI of the store, read with the credentials of this process.
        images: folder or URI with the photographs, each at its key. None: each row's URI in the index.
        texts: as for `create_app`.
        host: address to listen on. On others than loopback, requests need a token.
        port: 0 … 65535; 0 takes a free port.
        token: None: a random token if ``host`` is not a loopback address, else none.

    Raises:
        MissingPackage: the packages of the extra ``page`` are missing.
        StoreError: there is no store, or it is damaged.
        DensefeatError: the file of texts is damaged.
        OSError: the port is in use, or a storage error.
        ValueError: the texts have another number of channels than the features; the port is out of range; or the token
            is empty.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be 0 … 65535: got {port}")
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    app = create_app(store, images=images, texts=texts, host=host, token=token)
    try:
        import uvicorn
    except ImportError as error:
        raise missing_package("the page", error.name or "a package", "page") from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # from here on, a browser waits and is not refused
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port") from error
        sys.stdout.write(f"{store} is at {_address(host, listener.getsockname()[1], token)}\nCtrl+C stops the page.\n")
        sys.stdout.flush()
        # No access log: addresses contain the token.
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn after it has stopped
            server.run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether ``host`` can only be reached from this machine."""
    if host.lower() in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _address(host: str, port: int, token: str | None) -> str:
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
