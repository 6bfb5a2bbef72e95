"""What a model needs and is not installed is named in one line, with the extra that installs it."""

import json
from importlib.util import find_spec

import diffusers
import pytest
from transformers import AutoTokenizer

from omni_convert.formats.errors import RecipeError
from omni_convert.loaders import load_pipeline
from omni_convert.loaders.loading.packages import missing_package


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="it is installed")
def test_a_processor_that_cannot_be_imported(tiny_pipeline_folder, tmp_path):
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    AutoTokenizer.from_pretrained(tiny_pipeline_folder / "tokenizer").save_pretrained(tmp_path / "processor")
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))
    index = {
        "_class_name": "QwenImageEditPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "processor": ["transformers", "Qwen2VLProcessor"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError) as error:
        load_pipeline(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: found no package torchvision, which it needs; pip install 'omni-convert[pipelines]'"
    )


def caught(code: str) -> ImportError | NameError:
    try:
        exec(code, {})
    except (ImportError, NameError) as error:
        return error
    raise AssertionError(code)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_package", "found no package no_such_package, which it needs; pip install no_such_package"),
        ("no_such_package.run()", "found no package no_such_package"),
        ("raise ImportError('\\nX requires the SentencePiece library.\\nInstall it')", r"omni-convert\[pipelines\]"),
        ("raise ImportError('\\nX needs Y.\\nInstall it')", r"without packages that are not installed \(X needs Y\)"),
    ],
)
def test_what_a_library_says_becomes_one_line(code, message):
    error = missing_package("model", caught(code))
    assert str(error).startswith("model: ")
    assert "\n" not in str(error)
    with pytest.raises(RecipeError, match=message):
        raise error


def test_a_misspelt_name_stays_a_bug():
    with pytest.raises(NameError):
        missing_package("model", caught("json.loads('')"))
