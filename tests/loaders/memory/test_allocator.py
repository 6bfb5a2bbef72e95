import ctypes
from pathlib import Path

import pytest
import torch

from omni_convert.convert.execution.memory import anonymous_memory
from omni_convert.loaders.memory.allocator import release_free_memory


def has_malloc_trim():
    return Path("/proc/self/status").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not has_malloc_trim(), reason="glibc on Linux keeps freed memory, and tells how much is used")
def test_holes_between_tensors_go_back_to_the_system():
    # Less than what malloc maps apart: these lie in the heap, and every other one stays.
    pieces = [torch.ones(16 << 10, dtype=torch.uint8) for _ in range(4096)]
    kept = pieces[::2]
    del pieces
    before = anonymous_memory()
    release_free_memory()
    assert before - anonymous_memory() > 16 << 20
    assert all(bool((piece == 1).all()) for piece in kept)
