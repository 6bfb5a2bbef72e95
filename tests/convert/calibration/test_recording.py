"""Calibration of a real (tiny) pipeline, against what the layers really get."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel, ZImagePipeline
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3Model

from omni_convert.convert.calibration import pipeline_recorder as calibration
from omni_convert.convert.calibration.generation import GenerationSettings, run_pipeline
from omni_convert.convert.calibration.input_observer import InputObserver, candidate_layers
from omni_convert.convert.calibration.pipeline_recorder import PipelineRecorder, calibrate
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.layer_statistics import LayerStatistics
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.loaders import load_pipeline

SETTINGS = GenerationSettings(steps=3, width=32, height=32, guidance_scale=2.0)
# Prompts of different lengths, so that the shorter half of a guided batch is padded.
PROMPTS = [Prompt("a red circle on the left and a blue square on the right"), Prompt("a star"), Prompt("a ring")]
COMPONENTS = ("transformer", "text_encoder")


@pytest.fixture
def pipe(tiny_pipeline_folder: Path) -> Any:
    pipe = ZImagePipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def statistics(tiny_pipeline_folder: Path) -> Statistics:
    pipe = ZImagePipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    return calibrate(pipe, PROMPTS, SETTINGS, components=COMPONENTS, fingerprints={"transformer": "f" * 64})


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompt.text for prompt in PROMPTS))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_streamed_pipeline_gives_the_same_statistics(tiny_pipeline_folder: Path, dtype: torch.dtype) -> None:
    recorded = [
        calibrate(
            load_pipeline(tiny_pipeline_folder, torch_dtype=dtype, memory=memory),
            PROMPTS,
            SETTINGS,
            components=COMPONENTS,
        )
        for memory in ("full", "stream")
    ]
    assert recorded[0].fingerprint() == recorded[1].fingerprint()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_second_moments_of_a_streamed_pipeline_lie_in_files(
    prompts: list[Prompt], tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / memory for memory in ("full", "stream")]
    for path in paths:
        pipe = load_pipeline(tiny_pipeline_folder, memory=path.name)
        recorder = PipelineRecorder(pipe, SETTINGS, components=COMPONENTS, with_moments=True, scratch=tmp_path)
        moments = recorder.record(prompts).moments
        assert moments is not None
        in_files = {read().products.untyped_storage().filename is not None for read in moments.readers.values()}
        assert in_files == {path.name == "stream"}
        moments.save(path)
    full, streamed = (load_file(path) for path in paths)
    assert full.keys() == streamed.keys()
    for name, expected in full.items():  # sums of several prompts are rounded in another order
        error = (streamed[name].double() - expected.double()).norm() / expected.double().norm()
        assert error <= (1e-5 if len(prompts) > 1 else 0.0), name
    assert {*tmp_path.iterdir()} == {*paths}


def same(first: LayerStatistics, second: LayerStatistics) -> bool:
    return all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())


def inputs_of(layer: nn.Module) -> tuple[list[torch.Tensor], Any]:
    """Copies of all that goes into a layer from now on, and the hook."""
    seen: list[torch.Tensor] = []
    return seen, layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))


def test_the_layers_that_a_runtime_may_quantize_and_their_groups(pipe: Any) -> None:
    layers = candidate_layers(pipe.transformer)
    assert len(layers) == 4 * 7
    assert layers["layers.1.attention.to_v"] == "layers.1.attention.to_q"
    assert layers["layers.1.feed_forward.w3"] == "layers.1.feed_forward.w1"
    assert layers["layers.1.feed_forward.w2"] == "layers.1.feed_forward.w2"
    assert not any("adaLN" in name or "embedder" in name or "final" in name for name in layers)
    assert len(candidate_layers(pipe.text_encoder)) == 2 * 7


def test_what_is_recorded_is_what_the_layer_got(pipe: Any) -> None:
    # Without guidance there is one sequence and no padding: every row counts.
    settings = GenerationSettings(steps=3, width=32, height=32, guidance_scale=0.0)
    seen, hook = inputs_of(pipe.transformer.layers[1].feed_forward.w2)
    recorded = calibrate(pipe, PROMPTS[:1], settings).layers["transformer.layers.1.feed_forward.w2"]
    hook.remove()
    everything = torch.cat([values.flatten(0, -2) for values in seen]).float().abs()
    assert len(seen) == 3
    assert recorded.values_seen == everything.numel()
    assert torch.equal(recorded.channel_amax(), everything.amax(0))
    assert recorded.step_amax.tolist() == [float(values.abs().max()) for values in seen]


def test_the_text_encoder_is_recorded_without_padding_and_before_the_first_step(pipe: Any) -> None:
    settings = GenerationSettings(steps=2, width=32, height=32, guidance_scale=0.0)
    tokens = len(pipe.tokenizer(pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[1].text}], tokenize=False
    )).input_ids)  # fmt: skip
    recorded = calibrate(pipe, PROMPTS[1:2], settings, components=COMPONENTS).layers
    layer = recorded["text_encoder.model.layers.0.mlp.up_proj"]
    assert layer.values_seen == tokens * 64
    assert layer.step_amax.shape == (1,)
    assert layer.rows().shape[0] <= tokens


def test_padding_of_the_shorter_half_of_a_guided_batch_does_not_count(pipe: Any) -> None:
    masks: list[torch.Tensor] = []
    hook = pipe.transformer.layers[0].register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    recorded = calibrate(pipe, PROMPTS[:1], SETTINGS).layers["transformer.layers.0.attention.to_q"]
    hook.remove()
    assert all(mask.shape[0] == 2 and not bool(mask.all()) for mask in masks)
    assert recorded.values_seen == sum(int(mask.sum()) for mask in masks) * 192


def test_members_of_a_group_count_their_common_input_once(statistics: Statistics) -> None:
    layers = statistics.layers
    query, output = (layers[f"transformer.layers.0.attention.{leaf}"] for leaf in ("to_q", "to_out.0"))
    assert layers["transformer.layers.0.attention.to_k"] is query
    assert query.values_seen == output.values_seen  # both are 192 wide and see every token


def test_a_member_with_an_input_of_its_own_is_recorded_too(pipe: Any) -> None:
    observer = InputObserver({"transformer": pipe.transformer})
    attention = pipe.transformer.layers[0].attention
    first, second = (torch.randn(1, 4, 192, dtype=torch.bfloat16) for _ in range(2))
    with observer, torch.no_grad():
        attention.to_q(first)
        attention.to_k(second)
        attention.to_v(first.mul_(2))  # the same tensor with other values
    recorded = observer.statistics()["transformer.layers.0.attention.to_q"]
    assert recorded.values_seen == 3 * 4 * 192
    assert recorded.amax() == float(torch.cat([first, second]).abs().max())


def test_watching_changes_no_image_and_leaves_no_hook(pipe: Any) -> None:
    before = run_pipeline(pipe, PROMPTS[:1], SETTINGS, 0)[0][0].tobytes()
    observer = InputObserver({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    with observer:
        watched = run_pipeline(pipe, PROMPTS[:1], SETTINGS, 0)[0][0].tobytes()
    assert watched == before
    assert len(observer.statistics()) == 4 * 7 + 2 * 7
    assert not list(hooks_of(pipe))


def hooks_of(pipe: Any) -> Iterator[str]:
    for model in (pipe.transformer, pipe.text_encoder):
        for name, module in model.named_modules():
            if module._forward_pre_hooks or module._forward_hooks_always_called:
                yield name


def test_two_runs_give_the_same_file(statistics: Statistics, pipe: Any, tmp_path: Path) -> None:
    again = calibrate(pipe, PROMPTS, SETTINGS, components=COMPONENTS, fingerprints={"transformer": "f" * 64})
    statistics.save(tmp_path / "first")
    again.save(tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_prompts_may_be_spread_over_processes(statistics: Statistics, pipe: Any, tmp_path: Path) -> None:
    parts = [
        calibrate(pipe, prompts, SETTINGS, components=COMPONENTS, fingerprints={"transformer": "f" * 64})
        for prompts in (PROMPTS[2:], PROMPTS[:2])
    ]
    statistics.save(tmp_path / "whole")
    parts[0].merge(parts[1:]).save(tmp_path / "merged")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "merged").read_bytes()


def test_another_seed_gives_other_statistics(statistics: Statistics, pipe: Any) -> None:
    other = calibrate(pipe, PROMPTS, SETTINGS, seed=1)
    name = "transformer.layers.1.feed_forward.w2"
    assert not same(other.layers[name], statistics.layers[name])
    assert dict(other.identity.runs[0].settings)["seed"] == 1


def test_the_identity_says_what_was_run(statistics: Statistics) -> None:
    (run,) = statistics.identity.runs
    settings = dict(run.settings)
    assert (settings["steps"], settings["width"], settings["guidance_scale"], settings["seed"]) == (3, 32, 2.0, 0)
    assert settings["torch version"] == torch.__version__
    assert run.prompts == tuple(sorted(prompt.fingerprint() for prompt in PROMPTS))
    assert statistics.identity.fingerprints == {"transformer": "f" * 64}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_names_the_layer_and_the_step(pipe: Any, value: float) -> None:
    with torch.no_grad():
        pipe.transformer.layers[0].attention.to_out[0].weight[3, 5] = value
    with pytest.raises(
        CalibrationError, match=r"^transformer\.layers\.0\.feed_forward\.w1: found NaN or Inf .* at denoising step 0 of"
    ):
        calibrate(pipe, PROMPTS, SETTINGS)
    assert not list(hooks_of(pipe))


def test_requests_that_make_no_sense(pipe: Any) -> None:
    with pytest.raises(CalibrationError, match="found no prompts"):
        calibrate(pipe, [], SETTINGS)
    with pytest.raises(CalibrationError, match="found no 'transformer_2', expected one of"):
        calibrate(pipe, PROMPTS, SETTINGS, components=["transformer_2"])
    with pytest.raises(CalibrationError, match="vae: found no linear layers"):
        calibrate(pipe, PROMPTS, SETTINGS, components=["vae"])


def test_layers_that_never_ran_are_left_out_with_a_warning(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    observer = InputObserver({"transformer": pipe.transformer})
    with observer, torch.no_grad():
        pipe.transformer.layers[0].feed_forward(torch.randn(1, 4, 192, dtype=torch.bfloat16))
    assert sorted(observer.statistics()) == [f"transformer.layers.0.feed_forward.w{i}" for i in (1, 2, 3)]
    assert "transformer.layers.1.feed_forward.w2 never ran" in caplog.text


def test_an_expert_that_never_ran_needs_more_steps(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    observer = InputObserver({"transformer": pipe.transformer, "transformer_2": copy.deepcopy(pipe.transformer)})
    with observer, torch.no_grad():
        pipe.transformer.layers[0].feed_forward(torch.randn(1, 4, 192, dtype=torch.bfloat16))
    observer.statistics()
    warnings = [record.getMessage() for record in caplog.records if "transformer_2" in record.getMessage()]
    assert len(warnings) == 1
    assert "--calib-steps" in warnings[0]


@pytest.mark.parametrize(
    ("component", "advice"), [("transformer_2", "--calib-steps"), ("text_encoder_2", "--component text_encoder_2")]
)
def test_what_was_not_recorded_has_advice_that_fits(statistics: Statistics, component: str, advice: str) -> None:
    with pytest.raises(CalibrationError, match=advice):
        statistics.inputs_of(component, ["layers.0.attention.to_q"])


def test_a_source_is_calibrated_as_the_recipe_says(tiny_pipeline_folder: Path, prompts_file: Path) -> None:
    recipe = Recipe(
        calib=prompts_file,
        calib_steps=1,
        calib_size=(48, 32),
        calib_prompts=2,
        seed=3,
        component={"text_encoder": "fp8"},
        device="cpu",
    )
    statistics = record_source(resolve_source(tiny_pipeline_folder), recipe).statistics
    settings = dict(statistics.identity.runs[0].settings)
    assert (settings["steps"], settings["width"], settings["height"], settings["seed"]) == (1, 48, 32, 3)
    assert settings["guidance_scale"] == 2.0  # from the pipeline's own defaults
    assert statistics.identity.runs[0].prompts == tuple(sorted(prompt.fingerprint() for prompt in PROMPTS[:2]))
    for component in COMPONENTS:
        checkpoint = Checkpoint.open(tiny_pipeline_folder / component)
        assert statistics.identity.fingerprints[component] == checkpoint.fingerprint()
        stems = {name.removeprefix(f"{component}.") for name in statistics.layers if name.startswith(f"{component}.")}
        assert stems
        assert {f"{stem}.weight" for stem in stems} <= checkpoint.keys()


def test_steps_are_told_by_the_timestep_where_the_pipeline_does_not_tell() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    observer = InputObserver({"transformer": model}, counts_timesteps=True)
    latents, text = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 5, 16)
    with observer, torch.no_grad():
        for _ in range(2):
            observer.start(PROMPTS[0])
            for timestep in (900.0, 900.0, 500.0, 500.0, 100.0):  # twice each but for the last, as with guidance
                model(hidden_states=latents, timestep=torch.tensor([timestep]), encoder_hidden_states=text)
    assert observer.statistics()["transformer.blocks.1.ffn.net.2"].step_amax.shape == (3,)


def test_names_are_those_of_the_checkpoint_where_transformers_renames(tiny_pipeline_folder: Path) -> None:
    checkpoint = Checkpoint.open(tiny_pipeline_folder / "text_encoder")
    without_head = Qwen3Model.from_pretrained(tiny_pipeline_folder / "text_encoder")
    observer = InputObserver({"text_encoder": without_head})
    with observer, torch.no_grad():
        without_head(input_ids=torch.tensor([[1, 2, 3]]))
    recorded = observer.statistics()
    assert "text_encoder.layers.0.mlp.up_proj" in recorded
    stored = calibration._as_stored(recorded, {"text_encoder": checkpoint})
    assert len(stored) == len(recorded) == 14
    assert {f"{name.removeprefix('text_encoder.')}.weight" for name in stored} <= checkpoint.keys()
    assert stored["text_encoder.model.layers.0.mlp.up_proj"] is recorded["text_encoder.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("model.language_model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("model.visual.blocks.1.mlp.up_proj", "visual.blocks.1.mlp.up_proj"),
        ("visual.blocks.1.mlp.up_proj", "visual.blocks.1.mlp.up_proj"),
        ("somewhere.else", "somewhere.else"),
    ],
)
def test_the_stored_name_is_the_one_that_ends_most_alike(name: str, stored: str) -> None:
    stems = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "visual.blocks.1.mlp.up_proj", "lm_head"]
    assert calibration._stored_stem(name, stems) == stored


def test_a_component_alone_cannot_be_run(tiny_pipeline_folder: Path, prompts_file: Path) -> None:
    with pytest.raises(CalibrationError, match="found no pipeline"):
        record_source(resolve_source(tiny_pipeline_folder / "transformer"), Recipe(calib=prompts_file))


def test_an_identity_names_later_settings_only_where_they_are_used() -> None:
    names = [
        {name for name, _ in calibration.recording_identity([], {**asdict(settings), "seed": 0}, {}).runs[0].settings}
        for settings in (GenerationSettings(), GenerationSettings(guidance_scale_2=2.0, images_per_prompt=2))
    ]
    assert names[1] - names[0] == {"guidance_scale_2", "images_per_prompt"}
    assert "frames" in names[0]
