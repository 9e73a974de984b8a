"""Which requests are answered: Host header (against DNS rebinding), token, and the headers of every response."""

import hashlib
import hmac
import ipaddress
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, unquote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from densefeat.page.server import is_loopback

__all__ = ["Guard"]

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """ASGI middleware that refuses foreign Host headers (400), missing or wrong tokens (403), and sets headers.

    Args:
        app: the application.
        host: the address the server listens on. Loopback: only loopback names and addresses are accepted as Host.
            Other: any IP address, and the names of this machine; a rebound domain is a name, and is refused.
        token: None: no token is needed.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str | None) -> None:
        self.app = app
        self.token = token
        # Of its own for each token: browsers send cookies to all ports of a host, on which there may be several pages.
        self._cookie_name = f"densefeat_{hashlib.sha256((token or '').encode()).hexdigest()[:12]}"
        self._local = is_loopback(host)
        self._names = {"localhost", host.lower(), *(() if self._local else _names_of_this_machine())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # there are no websockets
            await self._answer(scope)(scope, receive, _with_headers(send))

    def _answer(self, scope: Scope) -> ASGIApp:
        headers = Headers(scope=scope)
        if not self._accepts_host(headers.get("host", "")):
            return PlainTextResponse("The Host header names another host than this server.", 400)
        if self.token is None:
            return self.app
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = next((value for name, value in query if name == "token"), None)
        if given is not None and self._is_token(given):
            return self._first_visit(scope, [pair for pair in query if pair[0] != "token"])
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(credentials.strip()):
            return self.app
        if self._is_token(_cookie(headers.get("cookie", ""), self._cookie_name)):
            return self.app
        return PlainTextResponse("This page needs its token: open the address that the command printed.", 403)

    def _accepts_host(self, header: str) -> bool:
        name = _without_port(header).lower().rstrip(".")
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return address.is_loopback or not self._local

    def _is_token(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())

    def _first_visit(self, scope: Scope, query: list[tuple[str, str]]) -> ASGIApp:
        """Keep the token in a cookie, and take it out of the address."""
        path = "/" + quote(scope["path"].lstrip("/"))  # one slash: two would name another host
        response = RedirectResponse(path + (f"?{urlencode(query)}" if query else ""), 303)
        response.set_cookie(self._cookie_name, quote(self.token or ""), httponly=True, samesite="lax")
        response.headers["Cache-Control"] = "no-store"
        return response


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(_HEADERS)
        await send(message)

    return sending


def _cookie(header: str, name: str) -> str:
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return unquote(morsel.value) if morsel else ""


def _without_port(header: str) -> str:
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0]


def _names_of_this_machine() -> set[str]:
    return {socket.gethostname().lower(), socket.getfqdn().lower()}
