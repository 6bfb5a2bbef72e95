"""Measures the house: how many files a room has, how long functions are, and how many files a question leads through.

Measures the installed `omni_convert`, so that two checkouts can be compared:

    files        modules of each room, without `__init__.py`
    lines        lines of Python in each layer, comments and docstrings included
    functions    lines from `def` to the end, docstrings included: median, 90th percentile, longest
    isinstance   tests for a format, by `isinstance` or a class pattern, outside the format's own file and the kernels
    paths        what runs from `main()` to the renamed folder, from `load_pipeline` to the first kernel, and from
                 `verify` to the first finding:
                 files       files in which a function ran
                 crossings   pairs of files of which one called the other
                 hops        calls that cross from one file into another, on the deepest chain of calls (`--chains`)

    python scripts/house.py
    python scripts/house.py --chains
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import pkgutil
import shutil
import statistics
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import diffusers
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from same_bytes import installed_program  # type: ignore[import-not-found]  # beside it
from tiny_models import save_pipeline  # type: ignore[import-not-found]

LAYERS = ("formats", "loaders", "convert")
THREAD_POOL = str(Path("concurrent", "futures", "thread.py"))


def trees(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            yield path.relative_to(root), ast.parse(path.read_text())


def print_rooms(root: Path) -> None:
    rooms = Counter(path.parent.as_posix() for path, _ in trees(root) if path.name != "__init__.py")
    print("files:", ", ".join(f"{room} {count}" for room, count in sorted(rooms.items())))
    print(f"       most {max(rooms.values())}, in all {sum(rooms.values())}")


def print_lines(root: Path) -> None:
    lines: Counter[str] = Counter()
    for path, _ in trees(root):
        lines[path.parts[0]] += len((root / path).read_text().splitlines())
    print("lines:", ", ".join(f"{layer} {count}" for layer, count in lines.items()), f"in all {lines.total()}")


def print_functions(root: Path) -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for _, tree in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    tenth = statistics.quantiles(lengths, n=10)[-1]
    print(f"functions: {len(lengths)}, median {statistics.median(lengths):.0f}, p90 {tenth:.0f}, max {lengths[-1]}")


def format_files(root: Path) -> dict[str, Path]:
    """Class of a format → the file that defines it, in `root`."""
    base = importlib.import_module("omni_convert.formats.format").Format
    package = importlib.import_module("omni_convert.formats")
    found: dict[str, Path] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        path = Path(str(module.__file__)).relative_to(root)
        found |= {value.__name__: path for value in own if _is_format(value, base)}
    return found


def _is_format(value: object, base: type) -> bool:
    return inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)


def print_isinstance(root: Path) -> None:
    owners = format_files(root)
    places: Counter[str] = Counter()
    for path, tree in trees(root):
        if path.is_relative_to("loaders/kernels"):
            continue
        groups = _tuples_of_formats(tree, owners)
        for node in ast.walk(tree):
            tested = {name for name in _tested_names(node) if owners.get(name, path) != path or name in groups}
            places[path.as_posix()] += bool(tested)
    places = +places
    print(f"isinstance on formats outside their files: {places.total()} in {len(places)} files")
    print("      ", ", ".join(f"{path} {count}" for path, count in places.most_common()))


def _tuples_of_formats(tree: ast.Module, owners: dict[str, Path]) -> set[str]:
    """Module constants that are made of formats alone, as `(Mxfp4, Nvfp4)`."""
    return {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.BinOp)
        for target in node.targets
        if isinstance(target, ast.Name) and (names := _names(node.value)) and names <= owners.keys()
    }


def _tested_names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        return _names(node.args[1])
    return _names(node.cls) if isinstance(node, ast.MatchClass) else set()


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


class _Stop(BaseException):
    """Ends a run at its destination."""


class CallPath:
    """Follows the calls of a run through the files of the package, on every thread.

    A job of a thread pool continues the chain of the call that submitted it.
    """

    def __init__(self, root: Path, end: str = "") -> None:
        self._prefixes = tuple(f"{root / layer}{os.sep}" for layer in LAYERS)
        self._root = root
        self._end = end
        self._local = threading.local()
        self._submitted: dict[int, tuple[str, ...]] = {}
        self.files: set[str] = set()
        self.crossings: set[tuple[str, str]] = set()
        self.deepest: tuple[str, ...] = ()
        self.has_ended = False

    def __enter__(self) -> CallPath:
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        stack: list[tuple[str, ...]] = self._local.__dict__.setdefault("stack", [])
        if event == "call":
            stack.append(self._chain(frame, stack[-1] if stack else ()))
        elif event == "return" and stack:
            stack.pop()

    def _chain(self, frame: FrameType, caller: tuple[str, ...]) -> tuple[str, ...]:
        """Files that the chain of calls up to this one has crossed into; each of them with the function."""
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith(THREAD_POOL):
            return self._job(frame, function, caller)
        if not file.startswith(self._prefixes):
            return caller
        name = os.path.relpath(file, self._root)
        self.files.add(name)
        before = caller[-1].partition(" ")[0] if caller else ""
        chain = caller if before == name else (*caller, f"{name} {frame.f_code.co_qualname}")
        if before not in ("", name):
            self.crossings.add((before, name))
        if len(chain) > len(self.deepest):
            self.deepest = chain
        if self._end and name.endswith(self._end):
            self.has_ended = True
            raise _Stop
        return chain

    def _job(self, frame: FrameType, function: str, caller: tuple[str, ...]) -> tuple[str, ...]:
        job = id(frame.f_locals.get("self"))
        if function == "__init__" and "fn" in frame.f_locals:
            self._submitted[job] = caller
        return self._submitted.get(job, caller) if function == "run" else caller


def report(label: str, path: CallPath, with_chain: bool) -> None:
    layers = Counter(name.partition(os.sep)[0] for name in path.files)
    files = ", ".join(f"{layer} {count}" for layer, count in sorted(layers.items()))
    print(f"{label}: {layers.total()} files ({files}), {len(path.crossings)} crossings, {len(path.deepest) - 1} hops")
    for step in path.deepest if with_chain else ():
        print(f"    {step}")


def run_command(*arguments: str) -> None:
    result = CliRunner().invoke(installed_program()[0], arguments, catch_exceptions=False)
    assert result.exit_code in (0, 1), result.output


def follow_conversion(root: Path, folder: Path) -> CallPath:
    for name in ("warm", "out"):
        with CallPath(root) as path:
            run_command("convert", str(folder / "tiny"), "-m", "fp8", "-o", str(folder / name), "--quiet")
    return path


def follow_loading(root: Path, folder: Path) -> CallPath:
    """Loads the model that `follow_conversion` made of the demo, and runs one layer."""
    from omni_convert.loaders import load_pipeline

    run_command("convert", "-m", "fp8", "-o", str(folder / "demo"), "--quiet")
    for _ in range(2):
        with CallPath(root) as path:
            pipeline = load_pipeline(folder / "demo")
            layer = pipeline.transformer.layers[0].attention.to_q
            layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))
    return path


def follow_verification(root: Path, folder: Path) -> CallPath:
    """Verifies a model with a NaN in a scale, until that is found."""
    broken = shutil.copytree(folder / "out", folder / "broken")
    (file,) = (broken / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    scale = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[scale].fill_(float("nan"))
    save_file(tensors, file)
    (broken / "omni_convert.json").unlink()
    run_command("verify", str(broken))
    try:
        with CallPath(root, end="finding.py") as path:
            run_command("verify", str(broken))
    except _Stop:
        pass
    assert path.has_ended, "nothing was found"
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", action="store_true", help="print the deepest chain of each run")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    _, root = installed_program()
    for measure in (print_rooms, print_lines, print_functions, print_isinstance):
        measure(root)
    runs: dict[str, Callable[[Path, Path], CallPath]] = {
        "main() to the renamed folder": follow_conversion,
        "load_pipeline to a kernel": follow_loading,
        "verify to a finding": follow_verification,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pipeline("z_image_pipeline", folder / "tiny")
        for label, follow in runs.items():
            report(label, follow(root, folder), arguments.chains)


if __name__ == "__main__":
    main()
