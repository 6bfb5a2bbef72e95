"""Denoising models of a pipeline that are in GGUF; diffusers runs them, dequantizing a weight before each use."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.errors as client
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from torch import nn

from omni_convert.formats.checks.gguf_verdicts import DIFFUSERS_TYPES
from omni_convert.formats.containers.component import DENOISERS, GGUF_SUFFIX
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.errors import CheckpointError, quoted

__all__ = ["load_gguf_components"]

# What diffusers takes as numbers, whatever the layer.
PLAIN = ("F32", "F16", "BF16")
# httpx's or httpx2's, whichever the client is built on.
REQUEST_ERRORS: type[Exception] = client.HTTPError  # type: ignore[attr-defined]  # imported there, not exported


def load_gguf_components(
    model: str | Path, torch_dtype: torch.dtype, hub_options: Mapping[str, Any] | None = None
) -> dict[str, nn.Module]:
    """Component to model, of those whose folder holds a GGUF file and no safetensors.

    Args:
        model: a folder, or a repository on the Hub, of which only these components are fetched
        torch_dtype: that of what they compute
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only` of `from_pretrained`

    Raises:
        CheckpointError: a file is damaged, of a type that diffusers does not dequantize, or one of several.
    """
    folder = Path(model) if Path(model).is_dir() else _fetched(str(model), hub_options or {})
    found = [path for name in DENOISERS if _is_gguf(path := folder / name)] if folder is not None else []
    if folder is None or not found:
        return {}
    index = read_json(folder / "model_index.json")
    listed = [path for path in found if isinstance(index.get(path.name), list)]
    return {path.name: _load(path, getattr(diffusers, index[path.name][1]), torch_dtype) for path in listed}


def _fetched(repo_id: str, options: Mapping[str, Any]) -> Path | None:
    """A folder with what a repository has in GGUF; None if that is nothing, or if diffusers will say what is wrong."""
    try:
        if options.get("local_files_only"):
            return Path(hf_hub_download(repo_id, "model_index.json", **options)).parent
        names = HfApi(token=options.get("token")).list_repo_files(repo_id, revision=options.get("revision"))
        in_gguf = {name: file for name in DENOISERS if (file := _only_gguf(repo_id, name, names)) is not None}
        if not in_gguf:
            return None
        files = ["model_index.json", *(f"{name}/config.json" for name in in_gguf), *in_gguf.values()]
        return Path(snapshot_download(repo_id, allow_patterns=[glob.escape(file) for file in files], **options))
    except (REQUEST_ERRORS, OSError, ValueError):
        return None


def _only_gguf(repo_id: str, component: str, names: Iterable[str]) -> str | None:
    """The GGUF file of a component; None if it has none, or is in safetensors, too."""
    files = [name for name in names if name.rpartition("/")[0] == component]
    found = sorted(name for name in files if name.endswith(GGUF_SUFFIX))
    if not found or any(name.endswith(".safetensors") for name in files):
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{repo_id}: found {len(found)} .gguf files (as {quoted(found[0])}, {quoted(found[1])}), expected one; "
            "download the repository with the one that is meant, and name the folder"
        )
    return found[0]


def _is_gguf(folder: Path) -> bool:
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))


def _load(folder: Path, model_class: type, torch_dtype: torch.dtype) -> nn.Module:
    from omni_convert.formats.containers.checkpoint import Checkpoint
    from omni_convert.formats.dialects.gguf import gguf_file_of

    with Checkpoint.open(folder) as checkpoint:
        file = gguf_file_of(checkpoint)
        assert file is not None, "the folder holds one"
        unknown = sorted({entry.type.name for entry in file.entries.values()} - {*DIFFUSERS_TYPES, *PLAIN})
    if unknown:
        raise CheckpointError(
            f"{file.path}: found {', '.join(unknown)}, which diffusers cannot dequantize, expected types as Q8_0; "
            "use ComfyUI-GGUF or stable-diffusion.cpp, or `omni-convert dequantize`"
        )
    model: nn.Module = model_class.from_single_file(  # type: ignore[attr-defined]  # of diffusers' models
        str(file.path),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch_dtype),
        torch_dtype=torch_dtype,
    )
    return model
