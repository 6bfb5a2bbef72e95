"""A linear layer whose columns are held by several layers, each with a format and scales of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ColumnParts"]


class ColumnParts(nn.Module):
    """`y = x_1 W_1^T + b_1 + x_2 W_2^T + b_2 + ...`, where `x` is `x_1`, `x_2`, ... beside each other."""

    def __init__(self, widths: Sequence[int], out_features: int, *, bias: bool) -> None:
        """Begins with linears on the meta device, to be replaced.

        Args:
            widths: columns of each part
            bias: whether each part has one
        """
        super().__init__()
        self.in_features, self.out_features = sum(widths), out_features
        self.widths = list(widths)
        with torch.device("meta"):
            self.parts = nn.ModuleList(nn.Linear(width, out_features, bias) for width in widths)

    @property
    def device(self) -> torch.device:
        """The device of the first part."""
        return next(itertools.chain(self.parts[0].parameters(), self.parts[0].buffers())).device

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        outputs = [part(columns) for part, columns in zip(self.parts, torch.split(x, self.widths, dim=-1), strict=True)]
        return torch.stack(outputs).sum(0)
