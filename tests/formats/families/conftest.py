"""The check that a family states the layers that a table copied by hand from the runtime has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import pytest
from torch import nn

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.table import find_family

#: Runtime name of a layer in a block → leaves of its members; () if it is one tensor of the same name.
Block = Mapping[str, tuple[str, ...]]

MERGED = re.compile(r".*\.(to_qkv|add_kv_proj|w13|linear_in|gate_up_proj)")


@pytest.fixture
def check_layers(
    tiny_specs: Callable[[str], Mapping[str, TensorSpec]], tiny_model: Callable[[str, str], nn.Module]
) -> Callable[..., None]:
    """A function that checks a family against a tiny model of its real class."""

    def check(model_class: str, blocks: Mapping[str, Block], never: Sequence[str]) -> None:
        """Checks what each runtime builds quantized.

        Args:
            model_class: in diffusers
            blocks: prefix of a block → its layers in vLLM-Omni
            never: linears that no runtime builds quantized
        """
        family, specs = find_family(model_class), tiny_specs(model_class)
        groups = family.layer_groups(specs, "vllm-omni")
        assert {group.runtime_name: group.members for group in groups} == _expected(blocks)
        fused = {group.runtime_name for group in groups if group.is_fused}
        assert fused == {name for name in _expected(blocks) if MERGED.fullmatch(name)}
        model = tiny_model("diffusers", model_class)
        for runtime in ("vllm-omni", "diffusers"):
            stems = [stem for group in family.layer_groups(specs, runtime) for stem in group.members]
            assert len(stems) == len(set(stems))
            for stem in stems:
                assert isinstance(model.get_submodule(stem), nn.Linear), stem
            for stem in never:
                assert f"{stem}.weight" in specs
                assert stem not in stems

    return check


def _expected(blocks: Mapping[str, Block]) -> dict[str, tuple[str, ...]]:
    """Runtime name → members, spelled out."""
    groups = {}
    for block, layers in blocks.items():
        for name, leaves in layers.items():
            whole = f"{block}.{name}"
            parent = whole.rsplit(".net_", 1)[0] if ".net_" in name else whole.rpartition(".")[0]
            groups[whole] = tuple(f"{parent}.{leaf}" for leaf in leaves) or (whole,)
    return groups
