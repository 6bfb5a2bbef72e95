"""Other projects' code, imported where it is installed: `pip install omni-convert[interop]`."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import pytest


def peer(name: str) -> ModuleType:
    """A module of the other side; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are its own affair
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed ({error}); pip install omni-convert[interop]")


@pytest.fixture
def import_peer():  # type: ignore[no-untyped-def]  # a function
    return peer
