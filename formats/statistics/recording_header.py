"""The header of files of statistics and moments: JSON in the metadata of safetensors that identifies the recording."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CalibrationError

__all__ = ["CalibrationRun", "Identity", "RecordingHeader", "RecordingKind", "read_header"]

Setting = int | float | str | None


@dataclass(frozen=True)
class CalibrationRun:
    """One run of a pipeline over prompts.

    Attributes:
        settings: steps, size, seed, versions and so on by name, sorted
        prompts: SHA-256 of each prompt, sorted; a prompt that was run twice occurs twice
    """

    settings: tuple[tuple[str, Setting], ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Identity:
    """The model and the runs that a recording comes from.

    Attributes:
        fingerprints: component → fingerprint of its weights (`Checkpoint.fingerprint`)
        runs: the runs, in an order that does not depend on the order of merging
    """

    fingerprints: Mapping[str, str]
    runs: tuple[CalibrationRun, ...]

    def merge(self, others: Iterable[Identity]) -> Identity:
        """The identity of merged recordings.

        Raises:
            CalibrationError: the recordings belong to different models.
        """
        fingerprints = dict(self.fingerprints)
        prompts: dict[tuple[tuple[str, Setting], ...], list[str]] = {}
        for identity in (self, *others):
            for component, fingerprint in identity.fingerprints.items():
                if fingerprints.setdefault(component, fingerprint) != fingerprint:
                    raise CalibrationError(
                        f"{component}: found statistics of different models ({fingerprints[component][:12]} and "
                        f"{fingerprint[:12]}), expected those of one; calibrate again"
                    )
            for run in identity.runs:
                prompts.setdefault(run.settings, []).extend(run.prompts)
        runs = (CalibrationRun(settings, tuple(sorted(texts))) for settings, texts in prompts.items())
        return Identity(dict(sorted(fingerprints.items())), tuple(sorted(runs, key=repr)))

    def check_model(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        """Raises CalibrationError if the recording is of another model than these components, given by name."""
        for name, checkpoint in checkpoints.items():
            expected = self.fingerprints.get(name)
            if expected is not None and expected != checkpoint.fingerprint():
                raise CalibrationError(
                    f"{name or checkpoint.path}: the statistics belong to another model (recorded on "
                    f"{expected[:12]}, this is {checkpoint.fingerprint()[:12]}); calibrate this model"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "fingerprints": dict(self.fingerprints),
            "runs": [{"settings": dict(run.settings), "prompts": list(run.prompts)} for run in self.runs],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Identity:
        """Inverts `to_json`; other input raises KeyError, TypeError, ValueError or AttributeError."""
        runs = []
        for run in content["runs"]:
            settings = tuple(sorted((str(name), _setting(value)) for name, value in run["settings"].items()))
            runs.append(CalibrationRun(settings, tuple(sorted(map(str, run["prompts"])))))
        return cls({str(name): str(value) for name, value in content["fingerprints"].items()}, tuple(runs))


def _setting(value: object) -> Setting:
    if value is None or isinstance(value, int | float | str):
        return value
    raise TypeError(f"a setting of type {type(value).__name__}")


@dataclass(frozen=True)
class RecordingKind:
    """A kind of file.

    Attributes:
        key: the key of the header in the metadata
        name: the name of the content in messages
        maker: the command that makes such a file
        version: version of the file format
    """

    key: str
    name: str
    maker: str
    version: int = 1


@dataclass(frozen=True)
class RecordingHeader:
    """The header of a file.

    Attributes:
        identity: the model and the runs that the file comes from
        owners: layer → name under which its tensors are stored; layers that read the same input share one name
    """

    identity: Identity
    owners: Mapping[str, str]

    def to_text(self, kind: RecordingKind) -> str:
        """The text in the metadata."""
        content = {"version": kind.version, **self.identity.to_json(), "layers": dict(self.owners)}
        return json.dumps(content, sort_keys=True, separators=(",", ":"))


def read_header(path: Path, metadata: Mapping[str, str], kind: RecordingKind) -> RecordingHeader:
    """Reads the header from the metadata of a file.

    Raises:
        CalibrationError: the header is missing, damaged or of another version.
    """
    text = metadata.get(kind.key)
    if text is None:
        raise CalibrationError(f"{path}: found a safetensors file without {kind.name}; make one with {kind.maker}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: the header is damaged ({error}); calibrate again") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != kind.version:
        raise CalibrationError(f"{path}: found {kind.name} of version {version!r:.20}, expected {kind.version}")
    try:
        owners = {str(layer): str(owner) for layer, owner in content["layers"].items()}
        return RecordingHeader(Identity.from_json(content), owners)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(f"{path}: the header is damaged ({error!r}); calibrate again") from None
