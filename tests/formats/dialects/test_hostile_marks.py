"""ComfyUI's marks, which nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CheckpointError

LAYER = {"a.0.weight": torch.zeros(2, 16, dtype=torch.float8_e4m3fn), "a.0.weight_scale": torch.ones(())}
MARK = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)


def refused(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    save_file(tensors, path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError) as caught:
        open_quantized(path / "x.safetensors")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mark_is_read(tmp_path: Path) -> None:
    save_file(LAYER | {"a.0.comfy_quant": MARK}, tmp_path / "x.safetensors")
    assert list(open_quantized(tmp_path / "x.safetensors").layers) == ["a.0"]


@pytest.mark.parametrize(
    "mark", [torch.zeros(4, dtype=torch.float8_e4m3fn), -MARK.view(torch.int8), MARK[:-1], MARK[:0]]
)
def test_a_mark_of_any_dtype_and_bytes_is_read_or_refused(tmp_path: Path, mark: torch.Tensor) -> None:
    message = refused(tmp_path, LAYER | {"a.0.comfy_quant": mark.clone()}, {})
    assert "tensor 'a.0.comfy_quant': found no JSON object" in message


@pytest.mark.parametrize("layers", ["x", 7, [1], None], ids=str)
def test_marks_in_the_header_are_an_object(tmp_path: Path, layers: Any) -> None:
    assert "found layers" in refused(tmp_path, LAYER, {"_quantization_metadata": json.dumps({"layers": layers})})


@pytest.mark.parametrize("name", [["float8_e4m3fn"], {"a": 1}, 7, None, "x\n" * 100], ids=range(5))
def test_a_format_is_one_of_the_names(tmp_path: Path, name: Any) -> None:
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a.0": {"format": name}}})}
    assert "found ComfyUI's format" in refused(tmp_path, LAYER, metadata)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000], ids=range(3))
def test_the_header_holds_json(tmp_path: Path, text: str) -> None:
    assert "_quantization_metadata in the header: found" in refused(tmp_path, LAYER, {"_quantization_metadata": text})
