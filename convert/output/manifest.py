"""The manifest, omni_convert.json: the source, the recipe, every layer, and the SHA-256 of every other file.

It holds no times, paths, devices or worker counts, so that the same job gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from omni_convert.convert.execution.component_result import LayerResult
from omni_convert.convert.execution.journal import JOURNAL
from omni_convert.convert.output.folder import write_text
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.plan.plan import Plan
from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.convert.source.file_hash import file_sha256
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.errors import OutputError

__all__ = ["VERSION", "describe_job", "read_results", "write_json", "write_manifest"]

VERSION = "0.1.0"
ERROR_DIGITS = 6


def describe_job(plan: Plan) -> dict[str, Any]:
    """Everything that must not change between the runs that make one output, for the journal, which may hold times."""
    files = {
        f"{component.name}/{name}": [
            file.size,
            file.header_sha256,
            *plan.source.state(f"{component.name}/{name}", file.path)[1:],
        ]
        for component in plan.components
        for name, file in component.checkpoint.files.items()
    }
    copies = {name: plan.source.state(name, path) for name, path in plan.copies.items()}
    configs = {f"{component.name}/config.json": _digest(component.config) for component in plan.components}
    return {
        "omni_convert_version": VERSION,
        "torch": torch.__version__,
        "recipe": plan.recipe.of_the_bytes(),
        "statistics": plan.statistics,
        "moments": plan.moments,
        **({"loras": dict(plan.loras)} if plan.loras else {}),
        "source": files | copies | configs,
    }


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    plan: Plan,
    results: Mapping[str, Sequence[LayerResult]],
    known: Mapping[str, str],
    source_sha256: Mapping[Path, str],
) -> None:
    """Writes the manifest, which must be the last file of the output, since it holds the hashes of the others.

    Args:
        folder: the output
        plan: the plan that was carried out
        results: component name → its quantized layers
        known: path inside the output → SHA-256 that is known already; other files in the folder are hashed now
        source_sha256: path → SHA-256 of files of the source, if the recipe asks for them
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = sorted((paths.keys() | known.keys()) - {MANIFEST, JOURNAL}, key=lambda name: Path(name).parts)
    write_json(
        folder / MANIFEST,
        {
            "omni_convert_version": VERSION,
            "source": {"name": plan.source.name, "revision": plan.source.revision},
            "recipe": plan.recipe.of_the_bytes(),
            "statistics": plan.statistics,
            "moments": plan.moments,
            **({"loras": dict(plan.loras)} if plan.loras else {}),
            "components": {
                component.name: {
                    "method": component.method,
                    "source_files": _source_files(component, source_sha256),
                    "layers": _layers(component, results[component.name]),
                    "kept": {layer.name: layer.reason for layer in component.kept},
                    **({"transcoded": dict(component.transcoded)} if component.transcoded else {}),
                    **({"unproven": component.unproven} if component.unproven else {}),
                }
                for component in plan.components
            },
            "files": {name: known.get(name) or file_sha256(paths[name]) for name in names},
        },
    )


def _source_files(component: ComponentPlan, sha256: Mapping[Path, str]) -> dict[str, Any]:
    return {
        name: {
            "bytes": file.size,
            "header_sha256": file.header_sha256,
            **({"sha256": sha256[file.path]} if file.path in sha256 else {}),
        }
        for name, file in sorted(component.checkpoint.files.items())
    }


def _layers(component: ComponentPlan, results: Sequence[LayerResult]) -> dict[str, Any]:
    labels = component.labels if component.is_mixed else {}
    return {
        result.name: {
            **({"format": labels[result.name]} if result.name in labels else {}),
            "bytes": result.bytes_after,
            "relative_error": round(result.relative_error, ERROR_DIGITS),
        }
        for result in results
    }


def read_results(folder: Path, plan: Plan) -> dict[str, list[LayerResult]]:
    """The layers of each component of a finished output, which must be the one that the plan would make.

    Raises:
        CheckpointError: the manifest is damaged.
        OutputError: the manifest belongs to another conversion.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        before = [manifest[name] for name in ("omni_convert_version", "recipe", "statistics", "moments")]
        recipe = json.loads(json.dumps(plan.recipe.of_the_bytes()))
        before.append(manifest.get("loras", {}))
        if before != [VERSION, recipe, plan.statistics, plan.moments, dict(plan.loras)]:
            raise _another(folder)
        return {component.name: _results_of(folder, component, manifest) for component in plan.components}
    except (KeyError, TypeError, AttributeError):
        raise OutputError(f"{folder / MANIFEST}: found a damaged manifest; use --overwrite") from None


def _results_of(folder: Path, component: ComponentPlan, manifest: Mapping[str, Any]) -> list[LayerResult]:
    described = manifest["components"][component.name]
    headers = {name: file["header_sha256"] for name, file in described["source_files"].items()}
    if headers != {name: file.header_sha256 for name, file in component.checkpoint.files.items()}:
        raise _another(folder)
    return [
        LayerResult(stem, step.format.method, weight.nbytes, layer["bytes"], layer["relative_error"])
        for step in component.quantize_steps
        for stem, weight in zip(step.group.members, step.weights, strict=True)
        for layer in [described["layers"][stem]]
    ]


def _another(folder: Path) -> OutputError:
    return OutputError(f"{folder}: found the finished output of another conversion; use --overwrite to replace it")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON in UTF-8, indented by two spaces, with a final newline; keys keep their order.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
