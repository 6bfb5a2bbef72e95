"""Memory that CPU kernels compute in: to get it anew in each call costs more page faults than the work done there."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["Scratch"]

# Of the size of a third-level cache, not of a model.
MOST_BYTES = 8 << 20


class Scratch(threading.local):
    """Memory of each thread, which keeps what it has used of 8 MiB."""

    _memory: Tensor | None = None

    def take(self, count: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """[count], valid until the thread's next call; allocated if it is more than a thread keeps, or not on a CPU."""
        size = count * dtype.itemsize
        if size > MOST_BYTES or (device is not None and device.type != "cpu"):
            return torch.empty(count, dtype=dtype, device=device)
        if self._memory is None:
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                memory = torch.empty(MOST_BYTES, dtype=torch.uint8, device="cpu")
            if type(memory) is not Tensor:  # of a tracer, which passes
                return memory[:size].view(dtype)
            self._memory = memory
        return self._memory[:size].view(dtype)
