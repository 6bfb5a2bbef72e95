"""Describes a failed request to the Hub in one line, without secrets.

Messages of the Hub's client are never passed on unchanged: they contain URLs, which may be signed.
"""

from __future__ import annotations

import huggingface_hub.errors as client
from huggingface_hub import get_token

__all__ = ["HUB_ERRORS", "cause_of", "hub_reason", "may_pass"]

# The base class of all request errors, from httpx or httpx2, whichever the client uses.
REQUEST_ERRORS: type[Exception] = client.HTTPError  # type: ignore[attr-defined]  # imported there, not exported
#: Everything that the client raises when a request fails.
HUB_ERRORS = (REQUEST_ERRORS, OSError, RuntimeError, ValueError, client.EntryNotFoundError)

RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
SHOWN_CHARACTERS = 200


def cause_of(error: BaseException) -> BaseException:
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


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, client.HfHubHTTPError):
        return _status(error) in RETRIED_STATUS
    if isinstance(error, client.OfflineModeIsEnabled):
        return False
    passing = (REQUEST_ERRORS, ConnectionError, TimeoutError, client.LocalEntryNotFoundError, RuntimeError)
    return isinstance(error, passing)


def hub_reason(error: BaseException, retries: int = 0) -> str:
    """The failure, and how to remedy it.

    Args:
        error: a result of `cause_of`
        retries: how often the request was repeated
    """
    if isinstance(error, client.LocalTokenNotFoundError):
        return "found no login to the Hub; `hf auth login`, or set HF_TOKEN"
    if isinstance(error, client.GatedRepoError):
        return "the repository is gated; accept its terms on the Hub, then `hf auth login`"
    if isinstance(error, client.RevisionNotFoundError):
        return "found no such revision on the Hub, expected a branch, tag or commit"
    if isinstance(error, client.RepositoryNotFoundError):
        return "neither a local path nor a repository on the Hub that this login can see"
    if isinstance(error, client.HfHubHTTPError):
        return _refusal(error, retries)
    if isinstance(error, client.HFValidationError):
        return "found no valid name of a repository, expected one like Qwen/Qwen-Image"
    if may_pass(error) or isinstance(error, client.OfflineModeIsEnabled):
        return f"the Hub does not answer ({type(error).__name__}); check the network, then try again"
    return f"found an answer of the Hub that its client cannot read ({_shown(str(error))})"


def _refusal(error: client.HfHubHTTPError, retries: int) -> str:
    status, text = _status(error), _shown(error.server_message or "")
    found = f"found {status} {error.response.reason_phrase}{f' ({text})' if text else ''}"
    if status == 401:
        return f"{found}, expected a valid token; `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"{found}, expected a login that may do this; use a token with read or write access, as needed"
    if status == 404:
        return f"{found}, expected the file; has it been deleted?"
    if status == 429:
        tries = f" after {retries} more tries" if retries else ""
        return f"{found}{tries}, expected an answer; wait a while, then try again"
    return f"{found}, expected an answer of the Hub; try again later"


def _shown(text: str) -> str:
    """A foreign text as one short line, in which the token is masked."""
    token = get_token()
    line = " ".join((text.replace(token, "***") if token else text).split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."
