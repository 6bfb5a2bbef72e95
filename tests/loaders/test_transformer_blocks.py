"""In transformers of diffusers, quantized layers survive what users do to a model: compile, export, offload, copy."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers.hooks import apply_group_offloading
from torch import nn

from omni_convert.formats.format import Format
from omni_convert.loaders.kernels.kernel import Activations, LayerTraits
from omni_convert.loaders.kernels.table import KERNELS, OVERRIDE
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear, quantize_linear
from omni_convert.loaders.loading.install import install_quantized
from omni_convert.loaders.loading.select import select_layers
from omni_convert.loaders.request.spec import build_quant_config

METHODS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8 channel": {"per_channel": True},
    "fp8 block": {"weight_block_size": (32, 32)},
    "int8": {},
    "mxfp8": {},
    "mxfp4": {},
    "mxfp4_dualscale": {},
    "nvfp4": {},
    "w4a16": {"group_size": 32},
}
CPU = torch.device("cpu")
DENOISERS = ("flux", "wan", "qwen", "z_image")
Run = Callable[[nn.Module, int], torch.Tensor]
Compile = Callable[[str, str, str], tuple[list[torch.Tensor], list[torch.Tensor]]]


@pytest.fixture
def build(make_denoiser) -> Callable[[str, str], Any]:
    """Builds a tiny model and has every linear of its blocks quantized."""

    def make(name: str, method: str) -> Any:
        denoiser = make_denoiser(name)
        model = denoiser.model
        layers, _ = select_layers(model, build_quant_config({"method": method.split()[0], **METHODS[method]}))
        for stem, fmt in layers.items():
            install_quantized(model, stem, model.get_submodule(stem).weight, fmt, name)
        assert len(quantized_layers(model)) > 10
        return denoiser

    return make


def assert_same_steps(model: nn.Module, run: Run, expected: list[torch.Tensor]) -> None:
    for step, out in enumerate(expected):
        assert torch.equal(run(model, step), out)


@pytest.fixture
def compile_and_run(build) -> Compile:
    """Compiles the blocks, a graph without a break each, and runs three steps, of which none may compile again."""

    def run_both(name: str, method: str, backend: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model, run, _ = build(name, method)
        expected = [run(model, step) for step in range(3)]
        torch.compiler.reset()
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        first = run(model, 0)
        with torch.compiler.set_stance("fail_on_recompile"):
            return [first, *(run(model, step) for step in (1, 2))], expected

    return run_both


def reordered(method: str) -> float:
    """Relative difference that other roundings between quantized layers may make: half of what quantizing one may."""
    return 0.1 if "4" in method else 0.025


QUICK = [("wan", "fp8"), ("wan", "int8"), ("qwen_masked", "fp8")]
OTHERS = [(name, method) for name in DENOISERS for method in METHODS if (name, method) not in QUICK]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_blocks_compile_as_one_graph_and_not_again_from_step_to_step(name, method, compile_and_run):
    compiled, expected = compile_and_run(name, method, "aot_eager")
    for ours, theirs in zip(compiled, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # used by inductor itself
@pytest.mark.parametrize("method", METHODS)
def test_blocks_compile_with_inductor(method, compile_and_run):
    compiled, expected = compile_and_run("wan", method, "inductor")
    for ours, theirs in zip(compiled, expected, strict=True):  # inductor keeps float32 where eager rounds to bfloat16
        assert (ours.float() - theirs.float()).norm() < reordered(method) * theirs.float().norm()


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_model_can_be_exported(name, method, build):
    model, run, inputs = build(name, method)
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs(0), "return_dict": False})
    exported, expected = run(program.module(), 1).float(), run(model, 1).float()
    # Z-Image rounds otherwise once it is exported, by 0.006 even without a quantized layer.
    assert (exported - expected).norm() <= (reordered(method) if name == "z_image" else 0) * expected.norm()


def test_a_text_mask_counts_where_it_hides_something(build):
    model, run, inputs = build("qwen_masked", "fp8")
    hiding = inputs(0)
    showing = hiding | {"encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.bool)}
    without = hiding | {"encoder_hidden_states_mask": None}
    with torch.no_grad():
        hidden, shown, plain = (model(**each, return_dict=False)[0].float() for each in (hiding, showing, without))
    # Another attention kernel takes masks, and rounds otherwise.
    assert (shown - plain).norm() < reordered("fp8") * plain.norm()
    assert (hidden - plain).norm() > reordered("fp8") * plain.norm()
    assert torch.equal(run(model, 0).float(), hidden)


def formats() -> dict[str, Format]:
    linear = nn.Linear(64, 32)
    return {method: quantize_linear(linear, method.split()[0], **options).format for method, options in METHODS.items()}


CPU_KERNELS = [
    pytest.param(fmt, activations, kernel.name, id=f"{method}-{activations}-{kernel.name}")
    for method, fmt in formats().items()
    for activations in get_args(Activations)
    for kernel in KERNELS
    if kernel.requirements.unmet(LayerTraits(fmt, 32, 64, CPU, activations)) is None
]


@pytest.mark.parametrize(("fmt", "activations", "kernel"), CPU_KERNELS)
def test_every_kernel_compiles_exports_and_can_be_pickled(fmt, activations, kernel, monkeypatch, noise):
    monkeypatch.setenv(OVERRIDE, kernel)
    torch.manual_seed(0)
    layer = quantize_linear(nn.Linear(64, 32).bfloat16(), fmt, activations=activations)
    x = noise(5, 64, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(compiled(x), expected)
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    assert layer.selection.kernel.name == kernel


STEPS = [
    ("flux", "fp8"),
    ("flux", "w4a16"),
    ("qwen", "fp8 block"),
    ("qwen", "nvfp4"),
    ("qwen_masked", "int8"),
    ("wan", "int8"),
    ("wan", "mxfp4_dualscale"),
    ("wan", "mxfp8"),
    ("z_image", "fp8 channel"),
    ("z_image", "mxfp4"),
]


@pytest.fixture(params=STEPS, ids="-".join)
def steps(request, build) -> tuple[nn.Module, Run, list[torch.Tensor]]:
    """A model, what runs it, and what comes out at each step."""
    model, run, _ = build(*request.param)
    return model, run, [run(model, step) for step in range(3)]


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_group_offload(steps, kind, on_disk, tmp_path):
    model, run, expected = steps
    path = str(tmp_path) if on_disk else None
    apply_group_offloading(model, CPU, CPU, offload_type=kind, num_blocks_per_group=1, offload_to_disk_path=path)
    assert_same_steps(model, run, expected)


def test_sequential_offload(steps):
    model, run, expected = steps
    cpu_offload(model, execution_device=CPU, offload_buffers=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert_same_steps(model, run, expected)


def test_sequential_offload_to_disk(steps, tmp_path):
    model, run, expected = steps
    disk_offload(model, str(tmp_path), execution_device=CPU, offload_buffers=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert_same_steps(model, run, expected)


def test_copies_pickles_and_state_dicts(steps):
    model, run, expected = steps
    assert_same_steps(copy.deepcopy(model), run, expected)
    assert_same_steps(pickle.loads(pickle.dumps(model)), run, expected)
    emptied = copy.deepcopy(model)
    for tensor in emptied.state_dict().values():
        tensor.zero_()
    emptied.load_state_dict(model.state_dict())
    assert_same_steps(emptied, run, expected)


def test_a_model_that_was_on_another_device_or_in_another_dtype_computes_the_same(steps):
    model, run, expected = steps
    kernels = [layer.selection.kernel for layer in quantized_layers(model)]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.float32).to(torch.bfloat16)
    assert_same_steps(model, run, expected)
    for layer in quantized_layers(model):
        layer.to("meta")
    model.load_state_dict(state, assign=True)
    assert_same_steps(model, run, expected)
    assert [layer.selection.kernel for layer in quantized_layers(model)] == kernels


def test_the_choice_of_a_kernel_does_not_change_while_a_model_runs(steps, monkeypatch):
    model, run, expected = steps
    monkeypatch.setenv(OVERRIDE, "none of that name")
    cpu_offload(model, execution_device=CPU, offload_buffers=True)
    assert_same_steps(model, run, expected)


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]
