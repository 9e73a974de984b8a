"""Classify storage errors: whether they concern the requested object, or the access to it.

Every client has its own exceptions, so they are recognised by class names and codes; no client has to be installed or
imported. File systems translate their client's exceptions, so the innermost informative cause decides (fsspec turns a
503 when opening a file into ``FileNotFoundError``).
"""

import email.utils
import errno
import math
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TypeGuard

from densefeat.errors import StorageUnavailable, WrongClock

__all__ = [
    "http_status",
    "is_full",
    "is_transient",
    "is_unreachable",
    "is_unreachable_for_good",
    "lacks_credentials",
    "retry_after",
    "wrong_clock",
]

_TRANSIENT_HTTP = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}


def _errnos(*names: str) -> frozenset[int]:
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))  # not every system has all


_TRANSIENT_ERRNO = _errnos(
    # devices and network file systems
    "EIO", "ESTALE", "EREMOTEIO", "ENODEV", "ENOMEDIUM", "ENOLCK", "EBUSY", "EUCLEAN",
    # the network
    "ETIMEDOUT", "ETIME", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ESHUTDOWN", "ENOTCONN", "ENETDOWN",
    "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EADDRNOTAVAIL", "ENOLINK", "ECOMM", "EPROTO", "ENONET",
    # this machine, at this moment
    "EAGAIN", "EINTR", "ECANCELED", "ENOBUFS", "ENOMEM", "ENOSR", "EMFILE", "ENFILE", "EUSERS",
)  # fmt: skip
_FULL_ERRNO = _errnos("ENOSPC", "EDQUOT", "EFBIG")
_CREDENTIAL_ERRNO = _errnos("ENOKEY", "EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED")  # NFS and AFS with Kerberos

_NAME_UNKNOWN = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))

# Class names by package; subclasses count as well.
_TRANSIENT_CLASSES = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError", "HttpProcessingError"},
    "azure": {"ServiceRequestError", "ServiceResponseError", "IncompleteReadError"},
    "botocore": {
        "ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError", "ChecksumError",
        "FlexibleChecksumError",
    },
    "gcsfs": {"ChecksumError"},
    "google": {"TransportError", "RetryError"},
    "http": {"IncompleteRead", "BadStatusLine", "LineTooLong", "ImproperConnectionState"},
    "httpcore": {"NetworkError", "TimeoutException", "ProtocolError", "ProxyError"},
    "httpx": {"TransportError"},
    "paramiko": {"SSHException"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError", "ContentDecodingError"},
    "urllib3": {"ProtocolError", "TimeoutError", "SSLError", "ProxyError", "PoolError", "IncompleteRead"},
}  # fmt: skip
_CREDENTIAL_CLASSES = {
    "azure": {"ClientAuthenticationError"},
    "botocore": {
        "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "MetadataRetrievalError",
        "TokenRetrievalError", "NoAuthTokenError", "SSOError", "LoginError", "ProfileNotFound",
        "UnknownCredentialError", "RefreshWithMFAUnsupportedError",
    },
    "google": {"GoogleAuthError"},
    "paramiko": {"AuthenticationException"},
}  # fmt: skip
_UNREACHABLE_CLASSES = {"aiohttp": {"ClientConnectorError", "ConnectionTimeoutError", "HttpProcessingError"}}

# Error codes of S3 and compatible servers. They are more specific than the status: RequestTimeout has status 400.
_TRANSIENT_CODES = frozenset({
    "BadDigest", "BandwidthLimitExceeded", "ConditionalRequestConflict", "EC2ThrottledException", "IncompleteBody",
    "InternalError", "InternalFailure", "InternalServerError", "OperationAborted", "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException", "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException",
    "RequestTimeout", "RequestTimeoutException", "ServerBusy", "ServiceUnavailable", "SlowDown", "SlowDownRead",
    "SlowDownWrite", "Throttled", "Throttling", "ThrottledException", "ThrottlingException", "TooManyRequestsException",
    "TransactionInProgressException", "XAmzContentSHA256Mismatch", "XMinioServerNotInitialized",
})  # fmt: skip
_CREDENTIAL_CODES = frozenset({
    "AccountProblem", "AllAccessDisabled", "AuthFailure", "ExpiredToken", "ExpiredTokenException",
    "IncompleteSignature", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidSecurity", "InvalidToken",
    "MissingAuthenticationToken", "NotSignedUp", "RequestExpired", "SignatureDoesNotMatch",
    "TokenRefreshRequired", "UnrecognizedClientException",
})  # fmt: skip
_CLOCK_CODE = "RequestTimeTooSkewed"
_MOST_SKEW_S = 15 * 60  # beyond which S3 refuses requests


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether there is no space left for what was to be written: the disk is full, or a quota or limit is reached."""
    return isinstance(error, OSError) and error.errno in _FULL_ERRNO


def is_transient(error: BaseException) -> bool:
    """Whether retrying may help, because the access to the object failed, not the object.

    An unknown host name counts too: a machine that has lost its network sees the same error.
    """
    causes = list(_causes(error))
    if any(isinstance(cause, StorageUnavailable) for cause in causes):  # already retried long enough
        return False
    verdicts = (_passes(cause) for cause in reversed(causes))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def lacks_credentials(error: BaseException) -> bool:
    """Whether every request of this client is refused: missing, expired or unknown credentials.

    Unlike "access denied", which can concern a single object.
    """
    return any(_refuses_everything(cause) for cause in _causes(error))


def wrong_clock(error: BaseException) -> str | None:
    """What is wrong with this machine's clock and what to do, if the storage refuses requests for it; else None.

    S3's clients sign the time of a request, and do not learn from a refusal.
    """
    refusal = next((cause for cause in _causes(error) if _refuses_the_clock(cause)), None)
    if refusal is None:
        return next((str(cause) for cause in _causes(error) if isinstance(cause, WrongClock)), None)
    here, there = datetime.now(UTC), _date(refusal)
    told = "" if there is None else f", that of the storage {there:%Y-%m-%d %H:%M:%S}"
    return (
        f"the clock of {socket.gethostname()} says {here:%Y-%m-%d %H:%M:%S} UTC{told}, so that the storage refuses all "
        "its requests: set the clock, and let chrony or another time service keep it right"
    )


def is_unreachable(error: BaseException) -> bool:
    """Whether no HTTP communication with the host was possible: name, connection, certificate or protocol."""
    return any(_is_a(cause, _UNREACHABLE_CLASSES) for cause in _causes(error))


def is_unreachable_for_good(error: BaseException) -> bool:
    """Whether waiting does not help, unless this machine is offline: an unknown name, or a bad certificate."""
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror) and cause.errno in _NAME_UNKNOWN:
            return True
        if isinstance(cause, ssl.CertificateError):
            return True
    return False


def http_status(error: BaseException) -> int | None:
    """HTTP status of the response, innermost cause first; None if there was no response."""
    statuses = (_status(cause) for cause in reversed(list(_causes(error))))
    return next((status for status in statuses if status is not None), None)


def retry_after(error: BaseException) -> float | None:
    """Seconds to wait according to ``Retry-After`` (a number or a date), at least 0; None without that header."""
    for cause in _causes(error):
        text = _header(cause, "Retry-After")
        if text is None:
            continue
        try:
            seconds = float(text)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its chain of causes."""
    seen: set[int] = set()
    current: Any = error
    while isinstance(current, BaseException) and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or getattr(current, "reason", None)  # urllib's URLError has it as "reason"


def _passes(error: BaseException) -> bool | None:
    """Whether this exception alone is transient; None if it does not tell."""
    if isinstance(error, ssl.CertificateError):  # aiohttp's class is also a connection error
        return False
    if _is_a(error, _CREDENTIAL_CLASSES):
        return _is_a(error, {"google": _TRANSIENT_CLASSES["google"]})
    if _is_a(error, _TRANSIENT_CLASSES) or _code(error) in _TRANSIENT_CODES:
        return True
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_HTTP
    # Timeouts of asyncio, fsspec and socket are TimeoutError. The numbers of SSLError and gaierror are not errno's.
    if isinstance(error, TimeoutError | ConnectionError | ssl.SSLError | socket.gaierror):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRNO
    return None


def _refuses_everything(error: BaseException) -> bool:
    if _is_a(error, _CREDENTIAL_CLASSES):
        return _passes(error) is False
    if _code(error) in _CREDENTIAL_CODES:
        return True
    if _is_a(error, {"gcsfs": {"HttpError"}}):
        return _status(error) == 401
    return isinstance(error, OSError) and error.errno in _CREDENTIAL_ERRNO


def _refuses_the_clock(error: BaseException) -> bool:
    code = _code(error)
    if code == _CLOCK_CODE or code not in ("403", "Forbidden"):
        return code == _CLOCK_CODE
    there = _date(error)  # the answer to HEAD has no body, and so no code
    return there is not None and abs((datetime.now(UTC) - there).total_seconds()) > _MOST_SKEW_S


def _date(error: BaseException) -> datetime | None:
    """When the response was made, by the server's clock."""
    text = _header(error, "Date")
    try:
        date = None if text is None else email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return None if date is None or date.tzinfo is None else date


def _is_a(error: BaseException, classes: Mapping[str, set[str]]) -> bool:
    return any(cls.__name__ in classes.get(cls.__module__.partition(".")[0], ()) for cls in type(error).__mro__)


def _code(error: BaseException) -> str | None:
    """Error code of botocore's ``ClientError``."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code if isinstance(code, str) else None


def _status(error: BaseException) -> int | None:
    """HTTP status in an error of botocore (``response`` is a dict), requests, httpx, aiohttp, azure, gcsfs, urllib."""
    if _is_a(error, {"aiohttp": {"HttpProcessingError"}}):  # aiohttp's own number for an invalid response
        return None
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        values = iter((response.get("ResponseMetadata", {}).get("HTTPStatusCode"), _code(error)))
    else:
        places = [(error, "status"), (error, "status_code"), (response, "status_code")]
        if not hasattr(error, "status"):  # aiohttp has a status, and warns if "code" is used
            places.append((error, "code"))
        values = (getattr(place, name, None) for place, name in places)
    numbers = (int(value) for value in map(str, values) if value.isdigit() and len(value) == 3)
    return next(numbers, None)


def _header(error: BaseException, name: str) -> str | None:
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        name = name.lower()  # botocore's header names are lower case
    else:
        headers = getattr(error, "headers", None) or getattr(response, "headers", None)
    try:
        value = headers.get(name) if headers is not None else None
    except AttributeError:
        return None
    return value if isinstance(value, str) else None
