"""Shows that a change of the code changes no byte of what the converter writes.

`make` converts the demo and a tiny model of every family with every method, dialect and many options into a folder. It
runs whatever `omni_convert` is installed, so that two checkouts can each make such a folder; `compare` reads both.

    python scripts/same_bytes.py make /tmp/after
    python scripts/same_bytes.py make /tmp/after --only flux_1 --only gguf
    python scripts/same_bytes.py compare /tmp/before /tmp/after

The folder has one sub-folder for each case: what the conversion wrote (`out`), its exit status and error
(`status.json`), and what `inspect` and `verify` say of it. A case differs if a weight file, an index, a config or an
exit status is another, if the manifest has other facts, or if `inspect` and `verify` name other layers and checks.
Model cards and the wording of errors, reasons and findings may differ; `--texts` prints where they do.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import logging
import os
import shutil
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from conversion_cases import RENAMED, Case, every_case  # type: ignore[import-not-found]  # beside it
from diffusers.utils.logging import disable_progress_bar
from tiny_models import PIPELINES, save_model, save_pipeline  # type: ignore[import-not-found]

MANIFEST = "omni_convert.json"
#: Fields of `inspect --json` and `verify --json` that hold sentences.
SENTENCES = ("what", "hurts", "remedy", "why", "reason", "verdict", "unchecked", "text", "message", "notes")


class Maker:
    """Makes cases, and first the models and cases that they read. Runs in the folder: no path in a file differs."""

    def __init__(self, program: click.Command) -> None:
        self._program = program
        self._runner = CliRunner()
        self._cases = {case.name: case for case in every_case()}

    def make(self, case: Case) -> None:
        """Runs a case, unless that has been done."""
        folder = Path(case.name)
        if (folder / "status.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        source = self._source_of(case)
        if source is None:
            _write(folder / "status.json", {"status": "no source", "error": ""})
            return
        self._prepare(case.arguments)
        arguments = [*source, *case.arguments, "-o", str(folder / "out"), "--quiet", "--workers", "2"]
        status = self.run("convert", *arguments)
        if case.is_verified and status["status"] == 0:
            for command in ("inspect", "verify"):
                status[command] = self.run(command, str(folder / "out"), "--json", output=folder / f"{command}.json")
        _write(folder / "status.json", status)

    def run(self, *arguments: str, output: Path | None = None) -> dict[str, Any]:
        """Exit status and error of a command, or the name of the exception that nobody caught."""
        result = self._runner.invoke(self._program, arguments)
        if output is not None:
            output.write_text(result.stdout)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            return {"status": type(result.exception).__name__, "error": str(result.exception)}
        return {"status": result.exit_code, "error": result.stderr if result.exit_code else ""}

    def _source_of(self, case: Case) -> list[str] | None:
        """The model to name, none for the demo; None if the case that should have made it was refused."""
        if not case.source:
            return []
        path = Path(case.source)
        if case.source in self._cases:
            self.make(self._cases[case.source])
            path /= "out"
            if not path.exists():
                return None
        elif path.suffix:
            self._make_original(path)
        else:
            path = Path("models") / path
            _build(path)
        if case.file:
            found = sorted(path.rglob(case.file))
            return [str(found[0])] if len(found) == 1 else None
        return [str(path)]

    def _prepare(self, arguments: Sequence[str]) -> None:
        """Makes the files that the arguments name."""
        if "--calibration" in arguments and not Path("calibration").exists():
            Path("calibration").mkdir()
            files = ("-o", "calibration/statistics.safetensors", "--moments", "calibration/moments.safetensors")
            few = ("--calib-prompts", "2", "--calib-steps", "2")
            result = self.run("calibrate", "--calib", "prompts.txt", *few, *files)
            assert result["status"] == 0, result
        if "--lora" in arguments and not Path("models/lora.safetensors").exists():
            _write_lora(Path("models/lora.safetensors"))

    def _make_original(self, path: Path) -> None:
        """Writes a model's tensors under its original names, as a GGUF file of the same model has them."""
        if path.exists():
            return
        from gguf import GGUFReader
        from safetensors.torch import save_file

        self.make(self._cases[f"{path.stem}/gguf.BF16"])
        folder = Path(path.stem) / "gguf.BF16" / "out"
        (file,) = folder.glob("*.gguf")
        tensors = {RENAMED[path.stem] + tensor.name: _tensor_of(tensor) for tensor in GGUFReader(file).tensors}
        path.parent.mkdir()
        shutil.copy(folder / "config.json", path.parent)
        save_file(tensors, path)


def _tensor_of(tensor: Any) -> Any:
    """A tensor that `gguf` reads, F32 or BF16, in BF16."""
    import torch

    values = torch.from_numpy(tensor.data.copy())
    if tensor.tensor_type.name == "BF16":
        values = values.view(torch.bfloat16)
    return values.to(torch.bfloat16).reshape([int(size) for size in reversed(tensor.shape)])


def _build(folder: Path) -> None:
    """Saves the model that a folder is named for."""
    if folder.exists():
        return
    (save_pipeline if folder.name in PIPELINES else save_model)(folder.name, folder)


def _write_lora(path: Path) -> None:
    """A LoRA of rank 4 for one layer of the demo."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    layer = "transformer.layers.0.attention.to_q"
    down, up = (torch.randn(size, generator=generator) * 0.02 for size in ((4, 384), (384, 4)))
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def installed_program() -> tuple[click.Command, Path]:
    """The command line of the installed `omni_convert`, which its pyproject.toml names, and its folder."""
    root = Path(str(importlib.import_module("omni_convert.convert").__file__)).parents[1]
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["omni-convert"].partition(":")
    return getattr(importlib.import_module(module), name), root


def make(arguments: argparse.Namespace) -> int:
    program, root = installed_program()
    chosen = [case for case in every_case() if all(part in case.name for part in arguments.only)]
    if arguments.fresh:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)
    print(f"{len(chosen)} cases with {root}", flush=True)
    started = time.monotonic()
    maker = Maker(program)
    for number, case in enumerate(chosen, 1):
        maker.make(case)
        if number % 100 == 0:
            print(f"{number} cases in {time.monotonic() - started:.0f} s", flush=True)
    statuses = [json.loads((Path(case.name) / "status.json").read_text())["status"] for case in chosen]
    counts = {str(status): statuses.count(status) for status in sorted(set(statuses), key=str)}
    print(f"{time.monotonic() - started:.0f} s; exit status → cases: {counts}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Prints each case that differs; 1 if any does."""
    before, after = _cases_of(arguments.before), _cases_of(arguments.after)
    names = sorted(name for name in before & after if all(part in name for part in arguments.only))
    print(f"{len(names)} cases in both, {len(before - after)} only before, {len(after - before)} only after")
    different = 0
    for name in names:
        found = list(differences(arguments.before / name, arguments.after / name, arguments.texts))
        hard = [text for text, is_hard in found if is_hard]
        different += bool(hard)
        for text in hard if not arguments.texts else [text for text, _ in found]:
            print(f"{name}: {text}")
    print(f"{different} cases differ")
    return int(different > 0)


def _cases_of(folder: Path) -> set[str]:
    return {path.parent.relative_to(folder).as_posix() for path in folder.glob("*/*/status.json")}


def differences(before: Path, after: Path, with_texts: bool) -> Iterator[tuple[str, bool]]:
    """The differences between two folders of one case, and whether they are more than a wording."""
    files = {path.relative_to(folder) for folder in (before, after) for path in folder.rglob("*") if path.is_file()}
    for file in sorted(files):
        old, new = before / file, after / file
        if not old.exists() or not new.exists():
            yield f"{file} is only {'before' if old.exists() else 'after'}", True
        elif old.read_bytes() != new.read_bytes():
            facts = FACTS.get(file.name)
            if facts is None:
                yield f"{file}: other bytes{_first_tensor(old, new)}", True
                continue
            lines = list(_changed_lines(facts(old), facts(new)))
            if lines:
                yield f"{file}: {'; '.join(lines[:6])}", True
            elif with_texts:
                yield f"{file}:\n" + "".join(_text_changes(old, new)), False


def _changed_lines(old: Any, new: Any) -> Iterator[str]:
    texts = [json.dumps(content, indent=1, sort_keys=True).splitlines() for content in (old, new)]
    for line in difflib.unified_diff(texts[0], texts[1], lineterm="", n=0):
        if not line.startswith(("---", "+++", "@@")):
            yield " ".join(line.split())


def _text_changes(old: Path, new: Path) -> Iterator[str]:
    lines = [path.read_text().splitlines(keepends=True) for path in (old, new)]
    for line in difflib.unified_diff(lines[0], lines[1], n=0):
        if not line.startswith(("---", "+++", "@@")):
            yield f"    {line}"


def _first_tensor(old: Path, new: Path) -> str:
    """Names the first tensor that differs, if they are safetensors files."""
    if old.suffix != ".safetensors":
        return ""
    from safetensors.torch import load_file

    tensors = [load_file(path) for path in (old, new)]
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        first, second = (each.get(name) for each in tensors)
        if first is None or second is None:
            return f", {name} is only {'before' if second is None else 'after'}"
        if first.dtype != second.dtype or first.shape != second.shape:
            return f", {name} is {first.dtype} {[*first.shape]}, then {second.dtype} {[*second.shape]}"
        if _bytes_of(first) != _bytes_of(second):
            return f", {name} has other values"
    return ", in the header only"


def _bytes_of(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _facts_of_manifest(path: Path) -> Any:
    """All but the version, the wording of reasons, and the hashes of files that hold sentences."""
    manifest = json.loads(path.read_text())
    manifest.pop("omni_convert_version")
    for component in manifest["components"].values():
        component["kept"] = sorted(component["kept"])
    manifest["files"].pop("README.md", None)
    return manifest


def _facts_of_report(path: Path) -> Any:
    """The facts that `inspect` and `verify` report, without their sentences."""
    return _without_sentences(json.loads(path.read_text() or "null"))


def _without_sentences(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_sentences(value) for key, value in content.items() if key not in SENTENCES}
    return [_without_sentences(each) for each in content] if isinstance(content, list) else content


def _facts_of_status(path: Path) -> Any:
    statuses = json.loads(path.read_text())
    return {
        key: value["status"] if isinstance(value, dict) else value for key, value in statuses.items() if key != "error"
    }


def _no_facts(_: Path) -> Any:
    return None


#: Files that hold sentences → what of them must be equal.
FACTS: dict[str, Callable[[Path], Any]] = {
    MANIFEST: _facts_of_manifest,
    "README.md": _no_facts,
    "inspect.json": _facts_of_report,
    "verify.json": _facts_of_report,
    "status.json": _facts_of_status,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="convert everything with the installed omni_convert")
    making.add_argument("folder", type=Path)
    making.add_argument("--fresh", action="store_true", help="delete the folder first; otherwise existing cases stay")
    making.set_defaults(run=make)
    comparing = commands.add_parser("compare", help="compare two folders that `make` made")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--texts", action="store_true", help="print where wordings differ, too")
    comparing.set_defaults(run=compare)
    for each in (making, comparing):
        each.add_argument("--only", action="append", default=[], help="cases with this in their name; repeatable: and")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    disable_progress_bar()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
