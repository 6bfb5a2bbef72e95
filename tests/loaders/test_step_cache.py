"""Step caches skip blocks as their settings say, on the real classes, and leave the model as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from omni_convert.formats.errors import RecipeError
from omni_convert.loaders import disable_step_cache, enable_step_cache, load_pipeline
from omni_convert.loaders.step_cache import step_cache_of
from omni_convert.loaders.tea_cache import MODELS

STEPS = 6
IMAGE_TOKENS, TEXT_TOKENS = 16, 8
SIZES = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32}
DUAL = {**SIZES, "num_single_layers": 2, "in_channels": 16}


class Case(NamedTuple):
    """A pipeline of one transformer, its inputs at a time, and the module that gets what the blocks made."""

    pipe: Any
    inputs: Callable[[float], dict[str, Any]]
    first: nn.Module
    attention: nn.Module
    final: nn.Module


def make_pipe(name: str, transformer: nn.Module) -> Any:
    kind = getattr(diffusers, name)
    components = {part: None for part in inspect.signature(kind.__init__).parameters if part != "self"}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = kind(**{**components, "transformer": transformer, "scheduler": scheduler})
    for parameter in transformer.parameters():  # some start as zeros, and then nothing that happens in a block shows
        nn.init.normal_(parameter, std=0.1)
    return pipe


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def z_image() -> Case:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 32, 32],
    )

    def inputs(time: float) -> dict[str, Any]:
        return {"x": [noise(4, 1, 8, 8) * (1 + time)], "t": torch.tensor([time]), "cap_feats": [noise(8, 32, seed=1)]}

    first = transformer.layers[0]
    return Case(
        make_pipe("ZImagePipeline", transformer), inputs, first, first.attention, transformer.all_final_layer["2-1"]
    )


def joint(name: str, transformer: nn.Module, ids: int, **rest: Any) -> Case:
    def inputs(time: float) -> dict[str, Any]:
        places = {"img_ids": torch.zeros(IMAGE_TOKENS, ids), "txt_ids": torch.zeros(TEXT_TOKENS, ids)} if ids else {}
        return {
            "hidden_states": noise(1, IMAGE_TOKENS, 16) * (1 + time),
            "encoder_hidden_states": noise(1, TEXT_TOKENS, 32, seed=1),
            "timestep": torch.tensor([time]),
            **places,
            **rest,
        }

    first = transformer.transformer_blocks[0]
    return Case(make_pipe(name, transformer), inputs, first, first.attn, transformer.norm_out)


def flux_2(name: str) -> Case:
    transformer = diffusers.Flux2Transformer2DModel(
        **DUAL, timestep_guidance_channels=32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False
    )
    return joint(name, transformer, 4, guidance=None)


CASES: dict[str, Callable[[], Case]] = {
    "z_image": z_image,
    "qwen_image": lambda: joint(
        "QwenImagePipeline",
        diffusers.QwenImageTransformer2DModel(**SIZES, in_channels=16, out_channels=4, axes_dims_rope=(8, 12, 12)),
        0,
        img_shapes=[[(1, 4, 4)]],
    ),
    "flux_1": lambda: joint(
        "FluxPipeline",
        diffusers.FluxTransformer2DModel(**DUAL, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12)),
        3,
        pooled_projections=torch.zeros(1, 32),
    ),
    "flux_2": lambda: flux_2("Flux2Pipeline"),
    "flux_2_klein": lambda: flux_2("Flux2KleinPipeline"),
    "longcat_image": lambda: joint(
        "LongCatImagePipeline",
        diffusers.LongCatImageTransformer2DModel(**DUAL, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12)),
        3,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


def entering(module: nn.Module, into: list[torch.Tensor]) -> None:
    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append(args[0] if args else kwargs["hidden_states"])

    module.register_forward_pre_hook(keep, with_kwargs=True)


def denoise(case: Case, calls_a_step: int = 1) -> list[torch.Tensor]:
    """What the transformer returns in each call of one picture."""
    scheduler = case.pipe.scheduler
    scheduler.set_timesteps(STEPS)
    out = []
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            for _ in range(calls_a_step):
                result = case.pipe.transformer(**case.inputs(float(timestep) / 1000), return_dict=False)[0]
                out.append(result[0] if isinstance(result, list) else result)
            scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    return out


def test_every_model_of_the_table_is_tried() -> None:
    pipes = [make().pipe for make in CASES.values()]
    names = {type(pipe).__name__ for pipe in pipes} | {type(pipe.transformer).__name__ for pipe in pipes}
    assert names >= MODELS.keys()


def test_a_skipped_step_adds_what_the_blocks_added_in_the_last_full_one(case: Case) -> None:
    enable_step_cache(case.pipe, "tea_cache", {"rel_l1_thresh": 1e9})
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    entering(case.first, before)
    entering(case.final, after)
    denoise(case)
    cache = step_cache_of(case.pipe)
    assert (cache.computed, cache.reused) == (1, STEPS - 1)
    tokens = before[0].shape[1]
    added = after[0][:, -tokens:] - before[0]
    assert added.norm() > before[0].norm() / 100
    for start, end in zip(before[1:], after[1:], strict=True):
        assert torch.equal(end[:, -tokens:], start + added)
    assert not torch.equal(before[0], before[1])


def test_steps_are_skipped_until_the_rescaled_distances_sum_up_to_the_threshold(case: Case) -> None:
    inputs: list[torch.Tensor] = []
    entering(case.attention, inputs)
    enable_step_cache(case.pipe, "tea_cache", {"rel_l1_thresh": 1e9})
    names = (type(case.pipe).__name__, type(case.pipe.transformer).__name__)
    rescale = np.poly1d(next(MODELS[name] for name in names if name in MODELS).coefficients)
    denoise(case)
    distances = [
        abs(float(rescale(float((now - then).abs().mean() / then.abs().mean())))) for then, now in pairwise(inputs)
    ]
    threshold = sum(distances[:2]) * 1.0001  # the third step is one too many
    expected, total = 1, 0.0
    for distance in distances:
        total += distance
        if total >= threshold:
            expected, total = expected + 1, 0.0
    disable_step_cache(case.pipe)
    enable_step_cache(case.pipe, "tea_cache", {"rel_l1_thresh": threshold})
    denoise(case)
    cache = step_cache_of(case.pipe)
    assert (cache.computed, cache.reused) == (expected, STEPS - expected)
    assert 1 < expected < STEPS


def test_pictures_and_branches_have_caches_of_their_own(case: Case) -> None:
    first = denoise(case)[0]
    enable_step_cache(case.pipe, "tea_cache", {"rel_l1_thresh": 1e9})
    assert all(torch.equal(denoise(case, calls_a_step=2)[call], first) for call in (0, 1))
    cache = step_cache_of(case.pipe)
    assert (cache.computed, cache.reused) == (4, 4 * (STEPS - 1))


def test_a_threshold_that_nothing_meets_and_a_cache_that_is_gone_change_nothing(case: Case) -> None:
    plain = denoise(case)
    enable_step_cache(case.pipe, "tea_cache", {"rel_l1_thresh": 1e-9, "coefficients": [0, 0, 0, 1, 0]})
    cached = denoise(case)
    assert step_cache_of(case.pipe).reused == 0
    disable_step_cache(case.pipe)
    for same in (cached, denoise(case)):
        assert all(torch.equal(*pair) for pair in zip(same, plain, strict=True))
    disable_step_cache(case.pipe)  # there is none now


def test_the_first_block_cache_of_diffusers() -> None:
    case = CASES["flux_1"]()
    enable_step_cache(case.pipe, "first_block_cache", {"threshold": 0.3})
    assert case.pipe.transformer.is_cache_enabled
    disable_step_cache(case.pipe)
    assert not case.pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(
    ("name", "backend", "config", "message"),
    [
        ("z_image", "teacache", {}, "found 'teacache', expected one of tea_cache, first_block_cache, cache_dit"),
        ("z_image", "tea_cache", {"rel_l1_thres": 0.2}, "found 'rel_l1_thres'.*did you mean 'rel_l1_thresh'"),
        ("z_image", "tea_cache", {"rel_l1_thresh": 0}, "found rel_l1_thresh 0, expected a positive number"),
        ("z_image", "tea_cache", {"rel_l1_thresh": True}, "expected a positive number"),
        ("z_image", "tea_cache", {"coefficients": [1, 2]}, "expected five numbers"),
        ("z_image", "first_block_cache", {}, "diffusers has no first_block_cache for ZImageTransformer2DModel"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, backend: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        enable_step_cache(CASES[name]().pipe, backend, config)


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own ControlNet uses it
def test_pipelines_whose_blocks_cannot_be_read() -> None:
    transformer = diffusers.WanTransformer3DModel(num_layers=1, num_attention_heads=2, attention_head_dim=12)
    with pytest.raises(RecipeError, match=r"WanPipeline, whose blocks it cannot read.*first_block_cache or cache_dit"):
        enable_step_cache(make_pipe("WanPipeline", transformer), "tea_cache")
    flux = CASES["flux_1"]().pipe
    controlnet = diffusers.FluxControlNetModel(**{**DUAL, "num_layers": 1, "num_single_layers": 0})
    encoders = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxControlNetPipeline(
        flux.scheduler, transformer=flux.transformer, controlnet=controlnet, **encoders
    )
    with pytest.raises(RecipeError, match="changes tokens between blocks"):
        enable_step_cache(pipe, "tea_cache")


def test_two_caches_at_once() -> None:
    case = CASES["z_image"]()
    enable_step_cache(case.pipe, "tea_cache")
    with pytest.raises(RecipeError, match="in use already"):
        enable_step_cache(case.pipe, "tea_cache")


def test_a_pipeline_is_loaded_with_its_cache(tiny_pipeline_folder) -> None:
    pipe = load_pipeline(tiny_pipeline_folder, cache_backend="tea_cache", cache_config={"rel_l1_thresh": 1e9})
    pipe.set_progress_bar_config(disable=True)
    pipe("a star", height=32, width=32, num_inference_steps=4)
    cache = step_cache_of(pipe)
    assert (cache.computed, cache.reused) == (1, 3)
    with pytest.raises(RecipeError, match="without a cache_backend"):
        load_pipeline(tiny_pipeline_folder, cache_config={"rel_l1_thresh": 0.2})
