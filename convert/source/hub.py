"""Requests to the Hub, repeated after failures that may pass.

The client itself repeats some requests and not others (whoami, listing and creating a repository), so all of them go
through `ask_hub`.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

import huggingface_hub.errors as client

from omni_convert.formats.errors import HubError, OutputError
from omni_convert.formats.hub_errors import HUB_ERRORS, cause_of, hub_reason, may_pass

__all__ = ["ask_hub"]

Answer = TypeVar("Answer")

WAITS = (1.0, 2.0, 4.0)
LONGEST_WAIT = 300.0


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
        except HUB_ERRORS as error:
            cause = cause_of(error)
            wait = next(waits, None)
            if wait is None or not may_pass(cause):
                raise _translated(where, cause) from None
            time.sleep(max(wait, min(_asked_to_wait(cause), LONGEST_WAIT)))


def _asked_to_wait(error: BaseException) -> float:
    """Seconds to wait according to the header `Retry-After`, or 0."""
    response = getattr(error, "response", None)
    try:
        return float(response.headers.get("Retry-After", 0)) if response is not None else 0.0
    except ValueError:  # a date
        return 0.0


def _translated(where: str, error: BaseException) -> HubError | OutputError:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OutputError(f"{where}: the disk is full; free some space, then continue with --resume")
    is_unreachable = not isinstance(error, client.HfHubHTTPError) and (
        may_pass(error) or isinstance(error, client.OfflineModeIsEnabled)
    )
    return HubError(f"{where}: {hub_reason(error, len(WAITS))}", is_unreachable=is_unreachable)
