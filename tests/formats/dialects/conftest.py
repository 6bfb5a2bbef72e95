"""Fixtures that tests of dialects share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.finding import Finding


@pytest.fixture(scope="session")
def errors() -> Callable[[Path], list[Finding]]:
    """What `verify` finds wrong in a folder with one component, without warnings."""

    def found(folder: Path) -> list[Finding]:
        (verified,) = verify_source(resolve_source(folder))
        return [finding for finding in verified.findings if finding.severity == "error"]

    return found


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Whether two files hold the same names, dtypes and bytes."""

    def is_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
        return first.keys() == second.keys() and all(
            tensor.dtype is second[name].dtype and tensor.view(torch.uint8).equal(second[name].view(torch.uint8))
            for name, tensor in first.items()
        )

    return is_same
