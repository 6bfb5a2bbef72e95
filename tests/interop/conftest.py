"""What tests with vLLM-Omni's code share."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import vllm_omni_runtime


@pytest.fixture(scope="session")
def peer() -> ModuleType:
    """The script that runs vLLM-Omni's code. It has to come before transformers and diffusers import torchvision."""
    vllm_omni_runtime.declare_operators()
    return vllm_omni_runtime


@pytest.fixture(scope="module")
def runtime(peer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Their code in this process."""
    yield peer.Runtime(tmp_path_factory.mktemp("group") / "file")
    torch.distributed.destroy_process_group()
