"""A linear whose columns are held by several layers computes what one layer does, and survives what layers have to."""

from __future__ import annotations

import copy
import pickle

import torch

from omni_convert.loaders.layers.column_parts import ColumnParts


def test_parts_compute_what_the_whole_does_and_can_be_copied() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole, x = torch.nn.Linear(12, 4), torch.randn(2, 3, 12)
    held = ColumnParts((4, 8), 4, bias=True)
    held.load_state_dict(
        {
            "parts.0.weight": whole.weight[:, :4], "parts.0.bias": torch.zeros(4),
            "parts.1.weight": whole.weight[:, 4:], "parts.1.bias": whole.bias,
        },
        assign=True,
    )  # fmt: skip
    assert (held.in_features, held.out_features) == (12, 4)
    compiled = torch.compile(held, fullgraph=True, backend="eager")
    for each in (held, copy.deepcopy(held), pickle.loads(pickle.dumps(held)), compiled):
        torch.testing.assert_close(each(x), whole(x))
