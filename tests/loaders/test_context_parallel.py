"""Context parallelism of diffusers splits tokens, not weights: two processes compute what one does, quantized or not.

`enable_parallelism` asks for an accelerator, and divides by zero where there is none; what else it does is
done here, with the same functions of diffusers. Run as a script, this file is one of the two processes.
"""

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ContextParallelConfig, FluxTransformer2DModel, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from omni_convert.loaders.loading.install import install_quantized
from omni_convert.loaders.loading.select import select_layers
from omni_convert.loaders.request.spec import build_quant_config

METHODS = ("none", "fp8", "int8", "mxfp4")
PROCESSES = 2
PATIENCE = 240  # seconds, most of them imports


def build(method: str) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    nn.Module.to(model, torch.bfloat16).eval().requires_grad_(False)
    config = build_quant_config(method)
    for stem, planned in (select_layers(model, config)[0] if config else {}).items():
        install_quantized(model, stem, model.get_submodule(stem).weight, planned, method)
    return model


def run(model: FluxTransformer2DModel) -> torch.Tensor:
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 8, 32).bfloat16(),
        "pooled_projections": torch.zeros(1, 32).bfloat16(),
        "timestep": torch.tensor([1.0]).bfloat16(),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def parallelize(model: FluxTransformer2DModel, config: ContextParallelConfig, rank: int) -> None:
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(rank, PROCESSES, torch.device("cpu"), mesh=mesh)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    apply_context_parallel(model, config, model._cp_plan)


def compare(method: str, kind: str, rank: int) -> str:
    """`equal`, `different`, or the error."""
    model = build(method)
    alone = run(model)
    try:
        parallelize(model, ContextParallelConfig(**{kind: PROCESSES}), rank)
        return "equal" if torch.equal(run(model), alone) else "different"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def work(rank: int, rendezvous: str) -> dict[str, dict[str, str]]:
    torch.set_num_threads(1)
    patience = dt.timedelta(seconds=PATIENCE)
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES, timeout=patience
    )
    kinds = ("ulysses_degree", "ring_degree")
    outcomes = {kind: {method: compare(method, kind, rank) for method in METHODS} for kind in kinds}
    distributed.destroy_process_group()
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, str]]]:
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    commands = [[sys.executable, __file__, str(rank), str(rendezvous)] for rank in range(PROCESSES)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        printed = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(text) for text in printed]


@pytest.mark.slow
def test_tokens_divided_by_ulysses_give_what_one_process_gives(outcomes):
    for outcome in outcomes:
        assert outcome["ulysses_degree"] == dict.fromkeys(METHODS, "equal")


@pytest.mark.slow
def test_a_ring_of_torchs_attention_is_refused_alike_with_and_without_quantization(outcomes):
    for outcome in outcomes:
        refusals = outcome["ring_degree"]
        assert refusals["none"].startswith("ValueError: Native attention does not support return_lse")
        assert set(refusals.values()) == {refusals["none"]}


if __name__ == "__main__":
    print(json.dumps(work(int(sys.argv[1]), Path(sys.argv[2]).as_posix())))  # noqa: T201  # read by the test
