"""Prints the lines of commands, and silences other libraries."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterable

import click

__all__ = ["announce_demo", "command_line", "print_lines", "quieten_hub", "silence_libraries"]


def announce_demo(model: str | None, what: str, *, quiet: bool) -> None:
    if model is None and not quiet:
        click.echo(f"No model named: {what} the bundled demo pipeline", err=True)


def command_line() -> str:
    """The command that runs, for a shell."""
    return shlex.join(["omni-convert", *sys.argv[1:]])


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def quieten_hub(*, hide_bars: bool) -> None:
    """Silences the Hub client, whose warnings about retries show URLs that may be signed."""
    from huggingface_hub.utils.logging import set_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    set_verbosity(logging.ERROR)
    for requests in ("httpx", "httpx2"):
        logging.getLogger(requests).setLevel(logging.WARNING)
    if hide_bars or not sys.stderr.isatty():
        disable_progress_bars()


def silence_libraries() -> None:
    """Hides the progress bars of diffusers and transformers while a pipeline loads."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
