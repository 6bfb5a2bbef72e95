"""The names of the package's front door are what they say, whatever was imported before."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import omni_convert.convert


def test_no_module_takes_the_place_of_a_public_name() -> None:
    for module in pkgutil.iter_modules(omni_convert.convert.__path__):
        importlib.import_module(f"omni_convert.convert.{module.name}")
    for name in omni_convert.convert.__all__:
        assert not isinstance(getattr(omni_convert.convert, name), ModuleType), name
