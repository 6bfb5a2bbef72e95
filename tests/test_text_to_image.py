"""scripts/text_to_image.py takes the options of serving engines, and says what ran."""

import re

import numpy as np
import pytest
import text_to_image
from PIL import Image

PROMPT = "a large red circle in the center on a blue background"


@pytest.fixture
def run(tmp_path):
    def call(*options):
        output = tmp_path / "picture.png"
        status = text_to_image.main(["--prompt", PROMPT, "--device", "cpu", "--output", str(output), *options])
        return status, output

    return call


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers|transformers")
def test_the_demo_draws_what_it_is_asked_for_and_shows_kernels_and_time(run, capsys):
    status, output = run("--quantization", "int8", "--ignored-layers", '["w2"]', "--num-inference-steps", "12")
    printed = capsys.readouterr().out
    assert status == 0
    assert "48 layers" in printed
    assert ".w2" not in printed
    assert "ms a step" in printed
    picture = np.asarray(Image.open(output).convert("RGB"), dtype=float)
    center, corner = picture[28:36, 28:36].mean((0, 1)), picture[:4, :4].mean((0, 1))
    assert center[0] > center[2] + 80, "red in the center"
    assert corner[2] > corner[0] + 80, "blue around it"


def test_what_does_not_fit_is_one_line(run, capsys):
    for options, expected in [
        (("--ignored-layers", "w2"), "found no --quantization"),
        (("--quantization", "int8", "--ignored-layers", "no_such_layer"), "matches no layer"),
        (("--quantization", "int8", "--ignored-layers", "[w2"), "JSON"),
        (("--cache-backend", "first_block_cache"), "use tea_cache or cache_dit"),
        (("--cache-backend", "tea_cache", "--cache-config", '{"thresh": 1}'), "found 'thresh'"),
        (("--cache-backend", "tea_cache", "--cache-config", "[1]"), "expected a JSON object"),
        (("--cache-config", '{"rel_l1_thresh": 0.2}'), "found settings of a cache without it"),
        (("--output", "picture.tensor"), "no file extension of an image"),
        (("--tensor-parallel-size", "2"), "use 1, or serve the model with vLLM-Omni"),
        (("--kv-cache-dtype", "fp8"), "found cpu without a kernel"),
        (("--kv-cache-skip-layers", "0-1"), "expected fp8"),
    ]:
        status, output = run(*options)
        error = capsys.readouterr().err
        assert status == 1
        assert expected in error
        assert "Traceback" not in error
        assert not output.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers|transformers")
def test_attention_in_fp8_is_reported(run, capsys):
    options = ("--kv-cache-dtype", "fp8", "--kv-cache-skip-layers", "0", "--kv-cache-skip-steps", "1-2")
    status, output = run(*options, "--fp8-attention-backend", "reference", "--num-inference-steps", "2")
    assert status == 0
    assert "attention: 3 native, 5 fp8_reference" in capsys.readouterr().out
    assert output.exists()


@pytest.mark.parametrize("setting", [("--cache-config", '{"rel_l1_thresh": 0.5}'), ("--cache-threshold", "0.5")])
@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers|transformers")
def test_tea_cache_skips_steps_and_draws_the_same_shape(run, capsys, setting):
    options = ("--cache-backend", "tea_cache", *setting, "--num-inference-steps", "12", "--tensor-parallel-size", "1")
    status, output = run("--quantization", "int8", *options)
    assert status == 0
    reused = int(re.search(r"tea_cache: (\d+) of 12 calls", capsys.readouterr().out)[1])
    assert 3 <= reused < 12
    picture = np.asarray(Image.open(output).convert("RGB"), dtype=float)
    assert picture[28:36, 28:36, 0].mean() > picture[28:36, 28:36, 2].mean() + 80


def test_the_prompt_of_serving_engines_is_the_default():
    assert text_to_image.build_parser().parse_args([]).prompt == "a cup of coffee on the table"


@pytest.mark.slow
def test_cache_dit_draws_the_same_shape(run):
    pytest.importorskip("cache_dit")
    status, output = run("--quantization", "fp8", "--cache-backend", "cache_dit")
    assert status == 0
    picture = np.asarray(Image.open(output).convert("RGB"), dtype=float)
    assert picture[28:36, 28:36, 0].mean() > picture[28:36, 28:36, 2].mean() + 80
