"""Single files without a config.json beside them: the model that they hold, by `--config` or by their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from omni_convert.convert.source.location import fetch_config
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError, RecipeError, listed
from omni_convert.formats.families.derived_config import DerivedConfig, Shapes
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.table import FAMILIES, find_family, model_class
from omni_convert.formats.views.original_names import prefixes_of, shapes_of, without_prefix

__all__ = ["derive_config", "missing_config", "read_given_config", "undecided_config"]

#: Where a model of diffusers has the config of its denoising model.
CONFIG_PLACES = ("transformer/config.json", "unet/config.json", "config.json")


def read_given_config(given: str) -> dict[str, Any]:
    """The config that `--config` names: a file, a folder of diffusers, or a repository on the Hub.

    Raises:
        RecipeError: nothing is there, or it is no config of diffusers.
        HubError: the Hub cannot deliver it.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        path = next((path / place for place in CONFIG_PLACES if (path / place).is_file()), path / CONFIG_PLACES[-1])
    elif not path.is_file():
        path = fetch_config(given, CONFIG_PLACES)
    if not path.is_file():
        raise RecipeError(f"--config {given}: found no config.json there, expected that of the model in diffusers")
    config = read_json(path)
    if not isinstance(config.get("_class_name"), str):
        raise RecipeError(f"--config {given}: found no _class_name in it, expected the config of a model of diffusers")
    return config


def derive_config(checkpoint: Checkpoint) -> DerivedConfig | None:
    """The config that the shapes of a checkpoint's tensors tell, under diffusers' names or original ones.

    Returns:
        None if they are those of no model that is known, or some tensors would have no place in it
    """
    for prefix in ("", *prefixes_of(checkpoint)):
        stored = without_prefix(checkpoint, prefix)
        for family in FAMILIES:
            for rule in family.config:
                derived = rule.derive(Shapes(stored, family.known_names))
                if derived is not None and _fits(derived.config, family, stored):
                    return derived
    return None


def _fits(config: Mapping[str, Any], family: Family, stored: Mapping[str, TensorSpec]) -> bool:
    """Whether a model has exactly the stored tensors, but for those that its class does without."""
    import diffusers

    try:
        shapes = shapes_of(getattr(diffusers, model_class(config)), config)
    except (TypeError, ValueError, KeyError, RuntimeError, IndexError, ZeroDivisionError, AssertionError):
        return False  # shapes of another model made up this config
    specs = {name: TensorSpec(name, torch.float32, shape) for name, shape in shapes.items()}
    runs = family.diffusers_runs(specs, stored)
    if runs is None:
        return False
    used = {run.source for found in runs.values() for run in found} | family.every_marker
    return all(name in used or family.is_spare(name) for name in stored)


def undecided_config(derived: DerivedConfig, path: Path) -> CheckpointError:
    """The error about a config of which shapes tell a part."""
    keys, kind = listed([f"'{key}'" for key in derived.undecided], 4), model_class(derived.config)
    return CheckpointError(
        f"{path}: file missing, and the tensors, those of {find_family(kind).name} ({kind}), do not tell its {keys}; "
        "expected --config FILE|REPO_ID, or the config.json of the model in diffusers beside the file"
    )


def missing_config(checkpoint: Checkpoint, path: Path) -> CheckpointError:
    """The error for a single file of an unknown model; names the likely one, as diffusers detects it."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    tensors = {name: torch.empty(spec.shape, device="meta") for name, spec in checkpoint.items()}
    kind = infer_diffusers_model_type(tensors)
    default = DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(kind, {}).get("pretrained_model_name_or_path")
    # diffusers answers "v1" for every model that it does not know.
    whose = f", by its tensors perhaps that of {default}" if default and kind != "v1" else ""
    return CheckpointError(
        f"{path}: file missing, and the tensors do not tell the model; expected --config FILE|REPO_ID, or the "
        f"config.json of the model in diffusers (its transformer folder) beside the file{whose}"
    )
