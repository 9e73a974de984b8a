"""Which errors of storage pass, which are about credentials, and waiting for those that pass."""

import concurrent.futures
import email.utils
import errno
import http.client
import socket
import ssl
import threading
import time
import urllib.error
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.http_exceptions import BadHttpMessage, ContentLengthError
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from densefeat.errors import StorageUnavailable, WrongClock
from densefeat.storage.failures import (
    http_status,
    is_transient,
    is_unreachable,
    is_unreachable_for_good,
    lacks_credentials,
    retry_after,
    wrong_clock,
)
from densefeat.storage.retries import retried

KEY = ConnectionKey("photos.example", 80, False, True, None, None, None)
UNKNOWN_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def answer(status: int, **headers: str) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(Mock(), (), status=status, headers=headers)


def s3(code: str, status: int) -> Exception:
    return boto.ClientError(
        {"Error": {"Code": code, "Message": "…"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class GcsError(Exception):
    """As gcsfs.retry.HttpError."""

    def __init__(self, code: int | str) -> None:
        super().__init__(f"…, {code}")
        self.code = code


GcsError.__name__, GcsError.__module__ = "HttpError", "gcsfs.retry"
GoogleAuthError = type("GoogleAuthError", (Exception,), {"__module__": "google.auth.exceptions"})
RefreshError = type("RefreshError", (GoogleAuthError,), {"__module__": "google.auth.exceptions"})
TransportError = type("TransportError", (GoogleAuthError,), {"__module__": "google.auth.exceptions"})

PASSES = [
    *(answer(status) for status in (408, 425, 429, 500, 502, 503, 504, 520, 522, 530)),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ServerTimeoutError(),
    aiohttp.ConnectionTimeoutError(),
    aiohttp.ClientConnectorError(KEY, ConnectionRefusedError(errno.ECONNREFUSED, "refused")),
    caused(aiohttp.ClientConnectorDNSError(KEY, UNKNOWN_NAME), UNKNOWN_NAME),
    aiohttp.ClientOSError(errno.ECONNRESET, "reset"),
    caused(aiohttp.ClientPayloadError("cut"), ContentLengthError("Not enough data")),
    caused(answer(400), BadHttpMessage("no HTTP")),  # aiohttp's own 400
    *(s3(*answered) for answered in (("SlowDown", 503), ("InternalError", 500), ("503", 503), ("RequestTimeout", 400))),
    *(translate_boto_error(s3(*answered)) for answered in (("SlowDown", 503), ("InternalError", 500), ("500", 500))),
    translate_boto_error(s3("RequestTimeout", 400)),
    translate_boto_error(s3("OperationAborted", 409)),
    boto.EndpointConnectionError(endpoint_url="x"),
    boto.ConnectTimeoutError(endpoint_url="x"),
    boto.ReadTimeoutError(endpoint_url="x"),
    boto.ConnectionClosedError(endpoint_url="x"),
    boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    boto.ResponseStreamingError(error="x"),
    ResponseParserError("no XML"),
    GcsError(503),
    GcsError("429"),
    TransportError("…"),
    FSTimeoutError(),
    TimeoutError(),
    concurrent.futures.TimeoutError(),
    http.client.IncompleteRead(b""),
    http.client.RemoteDisconnected(),
    ssl.SSLError(ssl.SSL_ERROR_SSL, "handshake"),  # its number is EPERM's
    ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF"),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    UNKNOWN_NAME,
    urllib.error.URLError(ConnectionResetError()),
    caused(FileNotFoundError("http://x"), answer(503)),  # fsspec's, when it opens a file
    caused(OSError("Read out of bounds"), ConnectionResetError()),
    *(
        OSError(getattr(errno, name), "…")
        for name in ("EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EMFILE", "ENFILE", "EAGAIN", "ENOMEM")
    ),
]
STAYS = [
    *(answer(status) for status in (400, 401, 403, 404, 405, 410, 416, 451, 501)),
    aiohttp.TooManyRedirects(Mock(), (), status=302),
    aiohttp.InvalidURL("http://"),
    FileNotFoundError(errno.ENOENT, "…"),
    FileNotFoundError("http://x"),
    caused(FileNotFoundError("http://x"), answer(404)),
    translate_boto_error(s3("NoSuchKey", 404)),
    translate_boto_error(s3("AccessDenied", 403)),
    translate_boto_error(s3("KMS.DisabledException", 400)),  # s3fs makes EIO of a code that it does not know
    PermissionError(errno.EACCES, "…"),
    IsADirectoryError(errno.EISDIR, "…"),
    *(OSError(getattr(errno, name), "…") for name in ("ELOOP", "ENAMETOOLONG", "ENOSPC", "EROFS", "EINVAL")),
    OSError("Unexpected end of stream"),
    ssl.SSLCertVerificationError(1, "expired"),
    ValueError("…"),
    KeyError("…"),
    UnicodeError("…"),
    MemoryError(),
    GcsError(404),
    caused(StorageUnavailable("…"), ConnectionResetError()),  # has been waited for
]
CREDENTIALS = [
    boto.NoCredentialsError(),
    boto.PartialCredentialsError(provider="x", cred_var="y"),
    boto.CredentialRetrievalError(provider="x", error_msg="y"),
    boto.TokenRetrievalError(provider="x", error_msg="y"),
    boto.UnauthorizedSSOTokenError(),
    *(
        translate_boto_error(s3(code, status))
        for code, status in (
            ("ExpiredToken", 400), ("InvalidAccessKeyId", 403), ("InvalidToken", 400),
            ("SignatureDoesNotMatch", 403), ("TokenRefreshRequired", 400), ("ExpiredTokenException", 400),
        )
    ),
    GcsError(401),
    RefreshError("invalid_grant"),
    OSError(errno.EKEYEXPIRED, "Key has expired"),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSES, ids=lambda error: type(error).__name__)
def test_what_passes(error: Exception) -> None:
    assert is_transient(error)
    assert not lacks_credentials(error)


@pytest.mark.parametrize("error", STAYS, ids=lambda error: type(error).__name__)
def test_what_stays(error: Exception) -> None:
    assert not is_transient(error)
    assert not lacks_credentials(error)


def at(code: str, seconds_ago: float) -> Exception:
    """S3's refusal, made so long ago by its clock."""
    date = email.utils.formatdate(time.time() - seconds_ago, usegmt=True)
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 403, "HTTPHeaders": {"date": date}}}
    return translate_boto_error(boto.ClientError(response, "HeadObject"))


@pytest.mark.parametrize("error", [at("RequestTimeTooSkewed", 3600), at("403", 3600), at("403", -3600)])
def test_a_wrong_clock_is_told_and_not_waited_for(error: Exception) -> None:
    """The answer to HEAD has a status and a date, but no code."""
    told = wrong_clock(error)
    assert told is not None
    assert socket.gethostname() in told
    assert "set the clock" in told
    assert not is_transient(error)
    assert not lacks_credentials(error)
    with pytest.raises(WrongClock, match=r"s3://b/x: the clock of .* UTC, that of the storage \d{4}-"):
        retried(Mock(side_effect=error), "s3://b/x")


@pytest.mark.parametrize("error", [at("403", 60), at("AccessDenied", 3600), s3("403", 403), answer(403)])
def test_other_refusals_are_not_the_clocks(error: Exception) -> None:
    assert wrong_clock(error) is None


@pytest.mark.parametrize("error", CREDENTIALS, ids=lambda error: type(error).__name__)
def test_credentials(error: Exception) -> None:
    assert lacks_credentials(error)
    assert not is_transient(error)


def test_hosts_that_cannot_be_reached() -> None:
    unknown = caused(aiohttp.ClientConnectorDNSError(KEY, UNKNOWN_NAME), UNKNOWN_NAME)
    certificate = ssl.SSLCertVerificationError(1, "expired")
    refused = aiohttp.ClientConnectorError(KEY, ConnectionRefusedError())
    uncertain = aiohttp.ClientConnectorDNSError(KEY, socket.gaierror(socket.EAI_AGAIN, "…"))
    assert all(map(is_unreachable, [unknown, refused, uncertain]))
    assert not any(map(is_unreachable, [answer(503), aiohttp.ServerDisconnectedError(), answer(404)]))
    assert is_unreachable_for_good(unknown)
    assert is_unreachable_for_good(caused(aiohttp.ClientConnectorCertificateError(KEY, certificate), certificate))
    assert not any(map(is_unreachable_for_good, [refused, uncertain, answer(503)]))


def test_statuses() -> None:
    assert http_status(answer(416)) == 416
    assert http_status(translate_boto_error(s3("InvalidRange", 416))) == 416
    assert http_status(s3("404", 404)) == 404
    assert http_status(GcsError("416")) == 416
    assert http_status(caused(FileNotFoundError(), answer(403))) == 403
    assert http_status(ConnectionResetError()) is None
    assert http_status(caused(answer(400), BadHttpMessage("no HTTP"))) == 400


def test_when_to_come_back() -> None:
    assert retry_after(answer(429, **{"Retry-After": "7"})) == 7
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert retry_after(answer(503, **{"Retry-After": in_a_minute})) == pytest.approx(60, abs=2)
    assert retry_after(answer(503, **{"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})) == 0
    for nonsense in ("soon", "nan", "inf", ""):
        assert retry_after(answer(503, **{"Retry-After": nonsense})) is None
    slow = boto.ClientError(
        {
            "Error": {"Code": "SlowDown"},
            "ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "3"}},
        },
        "GetObject",
    )
    assert retry_after(translate_boto_error(slow)) == 3
    assert retry_after(ConnectionResetError()) is None


class TestRetried:
    @staticmethod
    def failing(*errors: Exception) -> Mock:
        return Mock(side_effect=[*errors, "done"])

    def test_until_it_passes(self) -> None:
        operation = self.failing(ConnectionResetError(), OSError(errno.ESTALE, "stale"))
        assert retried(operation, "x", patience_s=5) == "done"
        assert operation.call_count == 3

    def test_what_stays_is_raised_at_once(self) -> None:
        operation = self.failing(FileNotFoundError("gone"))
        with pytest.raises(FileNotFoundError, match="gone"):
            retried(operation, "x", patience_s=5)
        assert operation.call_count == 1

    def test_until_the_patience_ends(self) -> None:
        begun = time.monotonic()
        with pytest.raises(StorageUnavailable, match=r"s3://b/1\.jpg did not answer.*ConnectionResetError") as raised:
            retried(Mock(side_effect=ConnectionResetError("reset")), "s3://b/1.jpg", patience_s=0.6)
        assert 0.5 < time.monotonic() - begun < 2
        assert isinstance(raised.value.__cause__, ConnectionResetError)

    def test_the_last_try_is_at_the_end_of_the_patience(self) -> None:
        end = time.monotonic() + 0.5

        def operation() -> str:
            if time.monotonic() < end:
                raise ConnectionResetError
            return "done"

        assert retried(operation, "x", patience_s=0.6) == "done"

    def test_a_server_says_when_to_come_back(self) -> None:
        begun = time.monotonic()
        assert retried(self.failing(answer(429, **{"Retry-After": "1"})), "x", patience_s=5) == "done"
        assert 1 <= time.monotonic() - begun < 2
        begun = time.monotonic()  # not longer than the patience reaches
        assert retried(self.failing(answer(429, **{"Retry-After": "3600"})), "x", patience_s=0.5) == "done"
        assert 0.5 <= time.monotonic() - begun < 2

    def test_can_be_stopped(self) -> None:
        stop = threading.Event()
        threading.Timer(0.2, stop.set).start()
        begun = time.monotonic()
        with pytest.raises(StorageUnavailable, match="stopped"):
            retried(Mock(side_effect=ConnectionResetError()), "x", patience_s=60, stop=stop)
        assert time.monotonic() - begun < 2

    def test_what_was_waited_for_is_not_waited_for_again(self) -> None:
        operation = Mock(side_effect=caused(StorageUnavailable("down"), ConnectionResetError()))
        with pytest.raises(StorageUnavailable, match="down"):
            retried(operation, "x", patience_s=5)
        assert operation.call_count == 1
