"""Memory that CPU kernels reuse: page faults of fresh memory would cost more time than the work in it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["Scratch"]

# About a third-level cache.
MOST_BYTES = 8 << 20


class Scratch(threading.local):
    """Memory of each thread, which keeps up to 8 MiB."""

    _memory: Tensor | None = None

    def take(self, count: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """[count], valid until the thread's next call; allocated if it is more than a thread keeps, or not on a CPU."""
        size = count * dtype.itemsize
        if size > MOST_BYTES or (device is not None and device.type != "cpu"):
            return torch.empty(count, dtype=dtype, device=device)
        if self._memory is None:
            with torch.inference_mode(False):  # else it could be written to in that mode only
                memory = torch.empty(MOST_BYTES, dtype=torch.uint8, device="cpu")
            if type(memory) is not Tensor:  # a tracer's tensor, which must not be kept
                return memory[:size].view(dtype)
            self._memory = memory
        return self._memory[:size].view(dtype)
