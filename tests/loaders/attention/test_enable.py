"""FP8 attention is on where it was asked for, at the steps it was asked for, and leaves nothing behind."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImagePipeline,
)
from torch import nn

from omni_convert.formats.errors import KernelError, RecipeError
from omni_convert.loaders import disable_fp8_attention, enable_fp8_attention, kernel_report
from omni_convert.loaders.attention.enable import count_attention_backends

ON = "fp8_reference"
DENOISERS = ("flux", "wan", "qwen", "qwen_masked", "z_image", "hunyuan_video_15")


def enable(model: Any, **options: Any) -> None:
    enable_fp8_attention(model, **{"backend": "reference", **options})


def enabled(model: nn.Module) -> list[str]:
    """Paths of the layers that run in FP8 now."""
    return [
        path
        for path, module in model.named_modules()
        if str(getattr(getattr(getattr(module, "processor", None), "_attention_backend", None), "value", None)) == ON
    ]


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("rotate", [False, True])
def test_a_model_computes_nearly_the_same_and_then_exactly(name, rotate, make_denoiser):
    model, run, _ = make_denoiser(name)
    before, state = run(model), set(model.state_dict())
    enable(model, rotate=rotate)
    assert set(model.state_dict()) == state
    error = (run(model).float() - before.float()).norm() / before.float().norm()
    assert 0.002 < error < 0.015
    disable_fp8_attention(model)
    assert torch.equal(run(model), before)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", DENOISERS)
def test_blocks_compile_as_one_graph_and_the_whole_can_be_copied_and_pickled(name, make_denoiser):
    model, run, _ = make_denoiser(name)
    enable(model, skip_layers=[1])
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), expected)
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(run(model), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    ("name", "skip_layers", "expected"),
    [
        ("flux", "1-2", ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]),
        ("flux", [0, 2], ["transformer_blocks.1.attn", "single_transformer_blocks.1.attn"]),
        ("wan", "0,2", ["blocks.1.attn1"]),
        ("qwen", "1", ["transformer_blocks.0.attn"]),
        ("z_image", "0", ["layers.1.attention"]),
    ],
)
def test_skipped_layers_stay_as_they_are(name, skip_layers, expected, make_denoiser):
    model = make_denoiser(name).model
    enable(model, skip_layers=skip_layers)
    assert enabled(model) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_layers": "0-"}, "^skip_layers: found '0-'"),
        ({"skip_layers": "7-9"}, "^skip_layers: found 7-9, which is no block .* expected some of 0-2"),
        ({"skip_layers": "0-9"}, "^skip_layers: found 0-9, which is every block"),
        ({"skip_steps": "0"}, "^skip_steps: found WanTransformer3DModel, expected a pipeline"),
    ],
)
def test_a_request_that_does_not_fit_changes_nothing(options, message, make_denoiser):
    model = make_denoiser("wan").model
    enable(model, skip_layers="0")
    with pytest.raises(RecipeError, match=message):
        enable(model, **options)
    assert enabled(model) == ["blocks.1.attn1", "blocks.2.attn1"], "as asked for before"


def test_without_a_kernel_nothing_is_enabled(make_denoiser):
    model = make_denoiser("wan").model
    with pytest.raises(KernelError, match="found cpu without a kernel"):
        enable_fp8_attention(model)
    assert not enabled(model)


def test_models_without_the_dispatch_are_refused():
    unet = UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    with pytest.raises(RecipeError, match="found no attention layer of UNet2DConditionModel"):
        enable(unet)
    with pytest.raises(RecipeError, match="found object, expected a model or a pipeline"):
        enable(object())


def test_one_processor_of_many_layers_is_set_apart(make_denoiser):
    model, run, _ = make_denoiser("wan")
    before = run(model)
    model.set_attn_processor(model.blocks[0].attn1.processor)
    enable(model, skip_layers="0")
    assert enabled(model) == ["blocks.1.attn1", "blocks.2.attn1"]
    disable_fp8_attention(model)
    assert torch.equal(run(model), before)


def test_the_backend_from_before_comes_back(make_denoiser):
    model = make_denoiser("flux").model
    for block in model.transformer_blocks:
        block.attn.processor._attention_backend = "_native_math"
    enable(model)
    assert count_attention_backends([model]) == {ON: 5}
    enable(model, rotate=False, skip_layers="0")
    assert count_attention_backends([model]) == {"_native_math": 1, "fp8_reference": 3, "native": 1}
    disable_fp8_attention(model)
    disable_fp8_attention(model)
    assert count_attention_backends([model]) == {"_native_math": 2, "native": 3}


def test_the_report_says_which_attention_runs_in_fp8(make_denoiser):
    model = make_denoiser("wan").model
    assert str(kernel_report(model)) == "no quantized layers"
    enable(model)
    assert str(kernel_report(model)) == f"no quantized layers\nattention: 3 {ON}, 3 native"


@pytest.fixture(scope="module")
def wan_folder(make_denoiser: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two experts, one for the noisy steps and one for the others."""
    folder = tmp_path_factory.mktemp("wan")
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    experts = {name: make_denoiser("wan").model for name in ("transformer", "transformer_2")}
    WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, boundary_ratio=0.7, **experts
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def wan_pipe(wan_folder: Path) -> Any:
    pipe = WanPipeline.from_pretrained(wan_folder, dtype=torch.bfloat16, tokenizer=None, text_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls(pipe: Any, run: Callable[[Any], Any]) -> list[tuple[str, bool]]:
    """Each call of a denoising model in a run, and whether it ran in FP8."""
    seen: list[tuple[str, bool]] = []
    models = {name: pipe.components[name] for name in ("transformer", "transformer_2") if name in pipe.components}
    hooks = [
        model.register_forward_hook(lambda module, _in, _out, name=name: seen.append((name, bool(enabled(module)))))
        for name, model in models.items()
    ]
    run(pipe)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture
def run_wan(noise) -> Callable[[Any], torch.Tensor]:
    def run(pipe: Any) -> torch.Tensor:
        return pipe(
            prompt_embeds=noise(1, 8, 32, seed=0),
            negative_prompt_embeds=noise(1, 8, 32, seed=1),
            height=32,
            width=32,
            num_frames=1,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    return run


def test_two_experts_with_guidance_share_one_count_of_steps(wan_pipe, run_wan):
    before = run_wan(wan_pipe)
    enable(wan_pipe, skip_steps="0,3-9")
    seen = calls(wan_pipe, run_wan)
    assert [is_on for _, is_on in seen] == [step in (1, 2) for step in range(5) for _ in range(2)]
    assert {name for name, _ in seen} == {"transformer", "transformer_2"}
    assert calls(wan_pipe, run_wan) == seen, "the next run counts from zero"
    disable_fp8_attention(wan_pipe)
    assert torch.equal(run_wan(wan_pipe), before)


def test_all_steps_skipped_are_as_if_it_were_off(wan_pipe, run_wan):
    before = run_wan(wan_pipe)
    enable(wan_pipe, skip_steps="0-99")
    assert torch.equal(run_wan(wan_pipe), before)
    enable(wan_pipe)
    assert not torch.equal(run_wan(wan_pipe), before)


def test_a_copied_pipeline_counts_its_own_steps(wan_pipe, run_wan):
    enable(wan_pipe, skip_steps="1-9")
    copied = copy.deepcopy(wan_pipe)
    wan_pipe.scheduler = None
    assert [is_on for _, is_on in calls(copied, run_wan)] == [True] * 2 + [False] * 8


def test_a_scheduler_that_is_exchanged_is_asked_from_then_on(wan_pipe, run_wan):
    enable(wan_pipe, skip_steps="0")
    wan_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert [is_on for _, is_on in calls(wan_pipe, run_wan)] == [False] * 2 + [True] * 8


def test_a_model_without_its_pipeline_says_so_instead_of_guessing_the_step(wan_pipe, make_denoiser):
    enable(wan_pipe, skip_steps="0")
    alone = pickle.loads(pickle.dumps(wan_pipe.transformer))
    with pytest.raises(RecipeError, match=r"^skip_steps: found no pipeline, expected"):
        make_denoiser("wan").run(alone)


def test_a_scheduler_that_counts_no_steps_is_refused(wan_pipe):
    wan_pipe.scheduler = DDIMScheduler()
    with pytest.raises(RecipeError, match=r"^skip_steps: found DDIMScheduler, expected"):
        enable(wan_pipe, skip_steps="0")


def test_steps_change_in_compiled_blocks_without_compiling_more_than_both_ways(wan_pipe, run_wan):
    enable(wan_pipe, skip_steps="1,3")
    expected = run_wan(wan_pipe)
    torch.compiler.reset()
    for model in (wan_pipe.transformer, wan_pipe.transformer_2):
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(run_wan(wan_pipe), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run_wan(wan_pipe), expected)


def test_z_image_runs_also_where_guidance_pads_one_prompt(pipeline_folder, make_image):
    pipe = ZImagePipeline.from_pretrained(pipeline_folder, dtype=torch.bfloat16)
    before = make_image(pipe, guidance_scale=0.0)
    enable(pipe, skip_steps="1")
    assert 0 < (make_image(pipe, guidance_scale=0.0) - before).abs().mean() < 0.05
    enable(pipe)
    in_fp8 = make_image(pipe)
    disable_fp8_attention(pipe)
    assert 0 < (in_fp8 - make_image(pipe)).abs().mean() < 0.05
    enable(pipe, rotate=True)
    with pytest.raises(KernelError, match="found heads of 24, expected a power of two; use rotate=False"):
        make_image(pipe, guidance_scale=0.0)
