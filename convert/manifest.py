"""omni_convert.json: what was made of what, and how; the same job gives the same bytes.

No times, paths, devices or worker counts. `files` holds the SHA-256 of every other file of the output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_convert.convert.execute import LayerResult
from omni_convert.convert.output import MANIFEST
from omni_convert.convert.plan import ComponentPlan, Plan

__all__ = ["VERSION", "file_sha256", "write_json", "write_manifest"]

VERSION = "0.1.0"
ERROR_DIGITS = 6


def write_manifest(
    folder: Path, plan: Plan, results: Mapping[str, Sequence[LayerResult]], statistics_id: str | None
) -> None:
    """Writes the manifest into a finished output folder; it must come last, since it hashes the other files."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(
        folder / MANIFEST,
        {
            "omni_convert_version": VERSION,
            "source": {"name": plan.source.name, "revision": plan.source.revision},
            "recipe": plan.recipe.of_the_bytes(),
            "statistics": statistics_id,
            "components": {
                component.name: _describe_component(component, results[component.name]) for component in plan.components
            },
            "files": {name: file_sha256(path) for name, path in files.items()},
        },
    )


def _describe_component(component: ComponentPlan, results: Sequence[LayerResult]) -> dict[str, Any]:
    return {
        "method": component.method,
        "source_files": {
            name: {"bytes": file.size, "header_sha256": file.header_sha256}
            for name, file in sorted(component.checkpoint.files.items())
        },
        "layers": {
            result.name: {
                "bytes": result.bytes_after,
                "relative_error": round(result.relative_error, ERROR_DIGITS),
            }
            for result in results
        },
        "kept": {layer.name: layer.reason for layer in component.kept},
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """UTF-8, two spaces, a newline at the end; keys in the order given."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
