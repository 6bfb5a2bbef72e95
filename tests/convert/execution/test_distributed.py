"""Conversions on a real Ray cluster: two nodes with a core each, on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.cli.main import main
from omni_convert.convert.cluster import connect
from omni_convert.convert.execution.journal import JOURNAL
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.errors import CalibrationError, CheckpointError, ClusterError

METHOD = "mxfp4"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STORE_BYTES = 80 << 20

pytestmark = [
    pytest.mark.slow,  # a minute on two idle cores; on busy ones nodes may miss their health checks
    # Ray's own: sockets, files and processes that it leaves to the collector or to its daemons.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def run(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records(output: Path) -> int:
    journal = output.with_name(output.name + ".partial") / JOURNAL
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
        },
    )
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    yield cluster
    processes = [
        info.process for node in cluster.list_all_nodes() for infos in node.all_processes.values() for info in infos
    ]
    cluster.shutdown()
    assert all(process.poll() is not None for process in processes)


@pytest.fixture(scope="module")
def engine(cluster: Any) -> Iterator[str]:
    """The cluster's address; this process stays connected, which saves each test seconds."""
    with connect(cluster.address):
        yield cluster.address


@pytest.fixture(scope="module")
def whole(larger_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of a conversion on this machine."""
    output = tmp_path_factory.mktemp("whole") / "out"
    convert_checkpoint(larger_pipeline, output, Recipe(method=METHOD))
    return digests(output)


def machine_of(number: int) -> tuple[int, str]:
    import ray

    time.sleep(0.2)
    return number, ray.get_runtime_context().get_node_id()


def test_every_node_works_and_results_come_in_order(engine: str) -> None:
    with connect(engine) as cluster:
        slots = cluster.slots(None, needs_gpu=False)
        assert (slots.count, slots.cores) == (2, 1)
        results = list(cluster.in_order(machine_of, ((number,) for number in range(12)), slots, 1 << 20))
    assert [number for number, _ in results] == list(range(12))
    assert len({node for _, node in results}) == 2


def endless_on(doomed: str, number: int, folder: str) -> int:
    """Says by a file that it began; on one of the nodes it never ends."""
    import ray

    is_doomed = ray.get_runtime_context().get_node_id() == doomed
    (Path(folder) / f"{number}-{is_doomed}").touch()
    time.sleep(3600 if is_doomed else 0.3)
    return number


def test_what_a_lost_node_was_at_runs_again(cluster: Any, engine: str, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()

    def kill_once_it_works() -> None:
        while not list(tmp_path.glob("*-True")):
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill_once_it_works)
    killer.start()
    with connect(engine) as connected:
        calls = ((node.node_id, number, str(tmp_path)) for number in range(8))
        results = list(connected.in_order(endless_on, calls, connected.slots(None, needs_gpu=False), 1 << 20))
    killer.join()
    assert results == list(range(8))


def test_work_ahead_is_bounded(engine: str) -> None:
    asked = 0

    def calls() -> Iterator[tuple[int]]:
        nonlocal asked
        for asked in range(1, 101):
            yield (asked,)

    with connect(engine) as cluster:
        slots = cluster.slots(None, needs_gpu=False)
        results = cluster.in_order(machine_of, calls(), slots, 1 << 20)
        next(results)
        assert asked == 2 * slots.count + 1
        results.close()


def test_the_bytes_are_those_of_one_machine(
    engine: str, larger_pipeline: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    done = []
    recipe = Recipe(method=METHOD, engine=engine)
    report = convert_checkpoint(larger_pipeline, tmp_path / "out", recipe, progress=done.append)
    assert digests(tmp_path / "out") == whole
    assert sum(done) == report.bytes_before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_shards(engine: str, larger_pipeline: Path, tmp_path: Path) -> None:
    recipe = Recipe(max_shard_size="5MB")
    convert_checkpoint(larger_pipeline, tmp_path / "local", recipe)
    convert_checkpoint(larger_pipeline, tmp_path / "ray", Recipe(max_shard_size="5MB", engine=engine))
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def test_gguf_is_written_and_read_by_all_machines(engine: str, larger_pipeline: Path, tmp_path: Path) -> None:
    recipe = Recipe("gguf")
    convert_checkpoint(larger_pipeline, tmp_path / "local", recipe)
    convert_checkpoint(larger_pipeline, tmp_path / "ray", replace(recipe, engine=engine))
    names = digests(tmp_path / "local")
    assert digests(tmp_path / "ray") == names
    assert sum(name.endswith(".gguf") for name in names) == 1
    recipe = Recipe("int8")
    convert_checkpoint(tmp_path / "ray", tmp_path / "local-int8", recipe)
    convert_checkpoint(tmp_path / "ray", tmp_path / "ray-int8", replace(recipe, engine=engine))
    assert digests(tmp_path / "ray-int8") == digests(tmp_path / "local-int8")


@pytest.mark.parametrize("method", ["svdquant_int4", "svdquant_nvfp4"])
@pytest.mark.parametrize("dialect", ["nunchaku", "nunchaku-lite"])
def test_svdquant_has_the_bytes_of_one_machine(
    engine: str, larger_pipeline: Path, tmp_path: Path, method: str, dialect: str
) -> None:
    recipe = Recipe(method, dialect=dialect, rank=16, force=True)
    convert_checkpoint(larger_pipeline / "transformer", tmp_path / "local", recipe)
    convert_checkpoint(larger_pipeline / "transformer", tmp_path / "ray", replace(recipe, engine=engine))
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def test_every_format_has_the_bytes_of_one_machine(
    engine: str, tiny_pipeline_folder: Path, tmp_path: Path, each_recipe: Recipe
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "local" / "out", each_recipe)
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "ray" / "out", replace(each_recipe, engine=engine))
    assert digests(tmp_path / "ray" / "out") == digests(tmp_path / "local" / "out")


def test_shards_go_to_a_url_from_where_they_are_made(
    engine: str, larger_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(max_shard_size="5MB")
    convert_checkpoint(larger_pipeline, tmp_path / "local", recipe)
    convert_checkpoint(larger_pipeline, f"file://{tmp_path}/bucket/ray", replace(recipe, engine=engine))
    assert digests(tmp_path / "bucket" / "ray") == digests(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket", "local"]


def test_a_node_that_dies_in_the_middle_changes_nothing(
    cluster: Any, engine: str, larger_pipeline: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    done = 0
    total = sum((larger_pipeline / "transformer" / name).stat().st_size for name in [WEIGHTS])

    def kill_in_the_middle(size: int) -> None:
        nonlocal done
        done += size
        if node in cluster.list_all_nodes() and done > total // 4:
            cluster.remove_node(node, allow_graceful=False)

    recipe = Recipe(method=METHOD, engine=engine)
    convert_checkpoint(larger_pipeline, tmp_path / "out", recipe, progress=kill_in_the_middle)
    assert node not in cluster.list_all_nodes()
    assert digests(tmp_path / "out") == whole


def test_a_killed_driver_is_resumed(
    cluster: Any, engine: str, larger_pipeline: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    output = tmp_path / "out"
    arguments = [larger_pipeline, "-m", METHOD, "-o", output, "--engine", cluster.address]
    process = subprocess.Popen(
        [sys.executable, "-m", "omni_convert.convert.cli", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not records(output):
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=60)
    assert records(output)
    assert not output.exists()
    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert digests(output) == whole


@pytest.fixture
def damaged(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A pipeline with a NaN in one of its weights."""
    shutil.copytree(tiny_pipeline_folder, tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "transformer" / WEIGHTS)
    weights["layers.1.feed_forward.w2.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "damaged" / "transformer" / WEIGHTS, {"format": "pt"})
    return tmp_path / "damaged"


def test_what_goes_wrong_elsewhere_is_one_line_here(engine: str, damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers.1.feed_forward.w2.weight': found NaN or Inf in rows") as caught:
        convert_checkpoint(damaged, tmp_path / "out", Recipe(engine=engine))
    assert "\n" not in str(caught.value)
    result = run(damaged, "-o", tmp_path / "out", "--engine", engine, "--overwrite")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: {caught.value}"
    assert not (tmp_path / "out").exists()


def test_more_cores_than_a_machine_has_are_refused(engine: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no machine with 64 cores; use fewer --workers"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(engine=engine, workers=64))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def calibration(tmp_path: Path) -> Recipe:
    """Five prompts of different lengths."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na red circle on the left\na ring\ntwo blue squares\nnothing at all\n")
    return Recipe(calib=prompts, component={"text_encoder": "fp8"}, runtime="diffusers")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sets the number of threads that the nodes have: with other numbers of threads torch adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_calibration_gives_the_statistics_of_one_process(
    engine: str, tiny_pipeline_folder: Path, calibration: Recipe, one_thread: None
) -> None:
    source = resolve_source(tiny_pipeline_folder)
    local = record_source(source, calibration, with_moments=True, progress=False)
    spread = record_source(source, replace(calibration, engine=engine), with_moments=True, progress=False)
    assert spread.statistics.fingerprint() == local.statistics.fingerprint()
    assert local.moments is not None
    assert spread.moments is not None
    assert spread.moments.owners == local.moments.owners
    for owner, read in local.moments.readers.items():
        expected, found = read(), spread.moments.readers[owner]()
        assert found.count == expected.count
        assert torch.equal(found.sample, expected.sample)
        torch.testing.assert_close(
            found.products, expected.products, rtol=1e-6, atol=1e-6 * float(expected.products.max())
        )


class Mortal:
    """Takes its process down with it the first time that it is asked."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def run(self, number: int) -> int:
        try:
            (self._folder / "died").touch(exist_ok=False)
        except FileExistsError:
            return number
        os._exit(1)


def test_what_a_lost_actor_was_at_runs_again(engine: str, tmp_path: Path) -> None:
    with connect(engine) as cluster:
        slots = cluster.slots(None, needs_gpu=False)
        calls = [(number,) for number in range(5)]
        results = list(cluster.on_actors(Mortal, (str(tmp_path),), calls, slots, 1 << 20))
    assert sorted(results) == list(range(5))


@pytest.mark.slow
def test_a_pipeline_that_computes_nan_is_one_line_here(engine: str, damaged: Path, calibration: Recipe) -> None:
    with pytest.raises(CalibrationError, match="found NaN or Inf in its input") as caught:
        record_source(resolve_source(damaged), replace(calibration, engine=engine), progress=False)
    assert "\n" not in str(caught.value)
