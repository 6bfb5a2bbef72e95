"""Requests to the Hub: failures that may pass are retried, others become one line without secrets.

The client itself repeats some requests and not others (whoami, listing and creating a repository), so all of them go
through `ask_hub`. Messages of the client are never passed on unchanged: they contain URLs, which may be signed.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

import huggingface_hub.errors as client
from huggingface_hub import get_token

from omni_convert.formats.errors import HubError, OutputError

__all__ = ["ask_hub"]

Answer = TypeVar("Answer")

# The base class of all request errors, from httpx or httpx2, whichever the client uses.
REQUEST_ERRORS: type[Exception] = client.HTTPError  # type: ignore[attr-defined]  # imported there, not exported
ERRORS = (REQUEST_ERRORS, OSError, RuntimeError, ValueError, client.EntryNotFoundError)

RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
WAITS = (1.0, 2.0, 4.0)
LONGEST_WAIT = 300.0
SHOWN_CHARACTERS = 200


def ask_hub(where: str, call: Callable[[], Answer]) -> Answer:
    """Returns `call()`, which uses the client; repeats it after a failure that may pass.

    Args:
        where: the repository, for messages
        call: may be repeated after it failed half-way

    Raises:
        HubError: the Hub refuses, fails for good, cannot be reached, or lacks what was asked for.
        OutputError: the disk is full.
    """
    waits = iter(WAITS)
    while True:
        try:
            return call()
        except ERRORS as error:
            cause = _cause(error)
            wait = next(waits, None)
            if wait is None or not _may_pass(cause):
                raise _one_line(where, cause) from None
            time.sleep(max(wait, min(_asked_to_wait(cause), LONGEST_WAIT)))


def _cause(error: BaseException) -> BaseException:
    """The original error of a request, which the client wraps in errors of its own."""
    seen = [error]
    while not isinstance(seen[-1], client.HfHubHTTPError) and (inner := seen[-1].__cause__ or seen[-1].__context__):
        if inner in seen:
            break
        seen.append(inner)
    return next((one for one in seen if isinstance(one, (client.HfHubHTTPError, client.OfflineModeIsEnabled))), seen[0])


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return response.status_code if response is not None else None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, client.HfHubHTTPError):
        return _status(error) in RETRIED_STATUS
    if isinstance(error, client.OfflineModeIsEnabled):
        return False
    passing = (REQUEST_ERRORS, ConnectionError, TimeoutError, client.LocalEntryNotFoundError, RuntimeError)
    return isinstance(error, passing)


def _asked_to_wait(error: BaseException) -> float:
    """Seconds to wait according to the header `Retry-After`, or 0."""
    response = getattr(error, "response", None)
    try:
        return float(response.headers.get("Retry-After", 0)) if response is not None else 0.0
    except ValueError:  # a date
        return 0.0


def _one_line(where: str, error: BaseException) -> HubError | OutputError:
    if isinstance(error, client.LocalTokenNotFoundError):
        return HubError(f"{where}: found no login to the Hub; `hf auth login`, or set HF_TOKEN")
    if isinstance(error, client.GatedRepoError):
        return HubError(f"{where}: the repository is gated; accept its terms on the Hub, then `hf auth login`")
    if isinstance(error, client.RevisionNotFoundError):
        return HubError(f"{where}: found no such revision on the Hub, expected a branch, tag or commit")
    if isinstance(error, client.RepositoryNotFoundError):
        return HubError(f"{where}: neither a local path nor a repository on the Hub that this login can see")
    if isinstance(error, client.HfHubHTTPError):
        return HubError(f"{where}: {_refusal(error)}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OutputError(f"{where}: the disk is full; free some space, then continue with --resume")
    if isinstance(error, client.HFValidationError):
        return HubError(f"{where}: found no valid name of a repository, expected one like Qwen/Qwen-Image")
    if _may_pass(error) or isinstance(error, client.OfflineModeIsEnabled):
        return HubError(
            f"{where}: the Hub does not answer ({type(error).__name__}); check the network, then try again",
            is_unreachable=True,
        )
    return HubError(f"{where}: found an answer of the Hub that its client cannot read ({_shown(str(error))})")


def _refusal(error: client.HfHubHTTPError) -> str:
    status, text = _status(error), _shown(error.server_message or "")
    found = f"found {status} {error.response.reason_phrase}{f' ({text})' if text else ''}"
    if status == 401:
        return f"{found}, expected a valid token; `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"{found}, expected a login that may do this; use a token with read or write access, as needed"
    if status == 404:
        return f"{found}, expected the file; has it been deleted?"
    if status == 429:
        return f"{found} after {len(WAITS)} more tries, expected an answer; wait a while, then try again"
    return f"{found}, expected an answer of the Hub; try again later"


def _shown(text: str) -> str:
    """A foreign text as one short line, in which the token is masked."""
    token = get_token()
    line = " ".join((text.replace(token, "***") if token else text).split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."
