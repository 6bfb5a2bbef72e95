"""The statistics file: exact merging, one meaning for one content, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omni_convert.formats.errors import CalibrationError, OutputError
from omni_convert.formats.statistics.layer_statistics import InputRecorder, LayerStatistics, observe
from omni_convert.formats.statistics.recording_header import CalibrationRun, Identity
from omni_convert.formats.statistics.statistics import METADATA_KEY, Statistics

Q, K, UP = "transformer.layers.0.to_q", "transformer.layers.0.to_k", "transformer.layers.0.up"


def layer(*batches: torch.Tensor) -> LayerStatistics:
    """One batch for each denoising step."""
    recorder = InputRecorder()
    for step, values in enumerate(batches):
        recorder.record(observe(values), step)
    statistics = recorder.statistics()
    assert statistics is not None
    return statistics


def noise(seed: int, width: int = 8, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(90, width, generator=torch.Generator().manual_seed(seed)).mul(scale).to(torch.bfloat16)


def statistics_of(seed: int, model: str = "a" * 64) -> Statistics:
    attention = layer(noise(seed), noise(seed + 100))
    run = CalibrationRun((("guidance_scale", 2.0), ("seed", 0), ("steps", 2)), (f"{seed:064x}",))
    layers = {Q: attention, K: attention, UP: layer(noise(seed + 200, 16))}
    return Statistics(Identity({"transformer": model}, (run,)), layers)


def rewrite(path: Path, change: dict[str, torch.Tensor] | None = None, **header: object) -> None:
    """Damages a file in a chosen way."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[METADATA_KEY]) | header
    tensors = load_file(path) | (change or {})
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(content)})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    statistics_of(1).save(tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


def test_a_file_holds_everything(file: Path) -> None:
    before, after = statistics_of(1), Statistics.load(file)
    assert after.identity == before.identity
    assert after.fingerprint() == before.fingerprint()
    assert list(after.layers) == sorted(before.layers)
    for name, recorded in before.layers.items():
        for suffix, tensor in recorded.tensors().items():
            loaded = after.layers[name].tensors()[suffix]
            assert torch.equal(loaded, tensor)
            assert loaded.dtype == tensor.dtype


def test_equal_statistics_are_equal_bytes(file: Path, tmp_path: Path) -> None:
    for name, statistics in (("again", statistics_of(1)), ("copy", Statistics.load(file))):
        statistics.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == file.read_bytes()


def test_layers_that_read_one_input_are_stored_once(file: Path) -> None:
    stored = {name.rpartition(".")[0] for name in load_file(file)}
    assert stored == {K, UP}  # the first of the two by name
    assert Statistics.load(file).layers.keys() == {Q, K, UP}


def test_files_merge_to_the_same_bytes_in_any_order_and_grouping(tmp_path: Path) -> None:
    parts = [statistics_of(seed) for seed in (1, 2, 3)]
    merged = set()
    for number, (first, second, third) in enumerate(itertools.permutations(parts)):
        for grouping, statistics in (
            ("left", first.merge([second]).merge([third])),
            ("right", first.merge([second.merge([third])])),
            ("flat", first.merge([second, third])),
        ):
            statistics.save(tmp_path / f"{number}-{grouping}")
            merged.add((tmp_path / f"{number}-{grouping}").read_bytes())
    assert len(merged) == 1
    assert len(parts[0].merge(parts[1:]).identity.runs) == 1
    assert len(parts[0].merge(parts[1:]).identity.runs[0].prompts) == 3


def test_merging_takes_maxima_and_sums() -> None:
    first, second = statistics_of(1), statistics_of(2)
    merged = first.merge([second]).layers[UP]
    assert merged.amax() == max(first.layers[UP].amax(), second.layers[UP].amax())
    assert torch.equal(merged.histogram, first.layers[UP].histogram + second.layers[UP].histogram)


def of_an_earlier_version(statistics: Statistics, path: Path) -> Statistics:
    """The statistics as they were written before they had sums of squares and runs of rows."""
    statistics.save(path)
    later = ("channel_squares", "row_runs")
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(later)}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    return Statistics.load(path)


def test_files_of_an_earlier_version_are_read_and_merged(tmp_path: Path) -> None:
    old, new = of_an_earlier_version(statistics_of(1), tmp_path / "old"), statistics_of(2)
    for merged in (old.merge([new]), new.merge([old]), old.merge([new.merge([new])])):
        assert merged.layers[UP].squares is None
        assert merged.layers[UP].row_runs() is None
        assert merged.layers[UP].amax() == max(old.layers[UP].amax(), new.layers[UP].amax())
    old.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "old").read_bytes()
    assert old.for_group("transformer", ("layers.0.up",)) is not None
    with pytest.raises(CalibrationError, match="found no mean squares"):
        old.importance_inputs("transformer", ("layers.0.up",))


def test_the_mean_square_of_merged_statistics_is_that_of_all_rows() -> None:
    merged = statistics_of(1).merge([statistics_of(2)]).importance_inputs("transformer", ("layers.0.up",))
    everything = torch.cat([noise(seed + 200, 16) for seed in (1, 2)])
    assert merged is not None
    torch.testing.assert_close(merged.mean_square().double(), everything.double().square().mean(0))


def test_components_that_only_one_side_has_are_united() -> None:
    encoder = Statistics(Identity({"text_encoder": "e" * 64}, ()), {"text_encoder.layers.0.up": layer(noise(5))})
    merged = statistics_of(1).merge([encoder])
    assert merged.identity.fingerprints == {"text_encoder": "e" * 64, "transformer": "a" * 64}
    assert len(merged.layers) == 4


def test_statistics_of_different_models_do_not_merge() -> None:
    with pytest.raises(CalibrationError, match="transformer: found statistics of different models"):
        statistics_of(1).merge([statistics_of(2, model="b" * 64)])
    nameless = [Statistics(Identity({}, ()), {UP: layer(noise(1, width))}) for width in (8, 16)]
    with pytest.raises(CalibrationError, match=r"different widths \(8, 16\)"):
        nameless[0].merge(nameless[1:])


def test_a_fused_group_gets_the_maximum_of_its_members() -> None:
    quiet, loud = layer(noise(1)), layer(noise(2, scale=10.0))
    statistics = Statistics(Identity({}, ()), {Q: quiet, K: loud, UP: layer(noise(3, 16))})
    group = statistics.for_group("transformer", ("layers.0.to_q", "layers.0.to_k"))
    assert group is not None
    assert group.amax() == loud.amax()
    assert torch.equal(group.channel_amax(), torch.maximum(quiet.channels, loud.channels))
    assert group.values_seen == quiet.values_seen + loud.values_seen
    assert statistics.for_group("transformer", ("layers.0.to_q",)) is quiet


def test_a_group_with_an_unknown_member_has_no_statistics() -> None:
    assert statistics_of(1).for_group("transformer", ("layers.0.to_q", "layers.0.to_v")) is None
    assert statistics_of(1).for_group("transformer_2", ("layers.0.to_q",)) is None


def test_an_outlier_far_above_the_rest_is_risky() -> None:
    values = torch.randn(4000, 8)
    values[7, 3] = 66_000.0
    statistics = Statistics(Identity({}, ()), {UP: layer(values), Q: layer(noise(1))})
    (risky,) = statistics.risky_layers()
    assert (risky.component, risky.stem, risky.amax) == ("transformer", "layers.0.up", 66_000.0)
    assert risky.outlier_ratio == pytest.approx(66_000 / risky.typical)
    assert "transformer.layers.0.up: largest input 6.6e+04 is" in str(risky)
    assert "\n" not in str(risky)


def test_an_amax_that_moves_over_the_steps_is_risky_and_the_worst_comes_first() -> None:
    moving = layer(noise(1), noise(2, scale=30.0), noise(3, scale=20.0))
    wild = layer(noise(4), noise(5, scale=300.0))
    still = layer(noise(6), noise(7, scale=4.0))
    statistics = Statistics(Identity({}, ()), {K: moving, UP: wild, Q: still})
    assert [risky.stem for risky in statistics.risky_layers()] == ["layers.0.up", "layers.0.to_k"]
    assert all("over the denoising steps" in str(risky) for risky in statistics.risky_layers())


def test_steps_in_which_a_layer_did_not_run_are_no_movement() -> None:
    recorder = InputRecorder()
    recorder.record(observe(noise(1)), 5)
    late = recorder.statistics()
    assert late is not None
    assert Statistics(Identity({}, ()), {UP: late}).risky_layers() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.rows": torch.ones(3, 16)}, "rows: found torch.float32"),
        ({f"{UP}.rows": torch.ones(65, 16, dtype=torch.bfloat16)}, "found 65 rows"),
        ({f"{UP}.channel_amax": torch.ones(15)}, "channel_amax: found"),
        ({f"{UP}.channel_amax": torch.full((16,), torch.nan)}, "NaN, Inf or negative"),
        ({f"{UP}.step_amax": torch.tensor([-1.0])}, "NaN, Inf or negative"),
        ({f"{UP}.step_amax": torch.empty(0)}, "step_amax: found"),
        ({f"{UP}.histogram": torch.ones(1026, dtype=torch.int64)}, "histogram: found"),
        ({f"{UP}.histogram": torch.full((1027,), -1)}, "NaN, Inf or negative"),
        ({f"{UP}.channel_squares": torch.ones(16, dtype=torch.int64)}, "channel_squares: found"),
        ({f"{UP}.channel_squares": torch.ones(2, 16)}, "channel_squares: found torch.float32"),
        ({f"{UP}.channel_squares": torch.full((2, 16), -1)}, "NaN, Inf or negative"),
        ({f"{UP}.row_runs": torch.ones(64, 3, dtype=torch.int64)}, "row_runs: found"),
        ({f"{UP}.row_runs": torch.ones(9, 2, dtype=torch.int64)}, "found 9 runs for 64 rows"),
    ],
)
def test_damaged_tensors_are_named(file: Path, change: dict[str, torch.Tensor], message: str) -> None:
    rewrite(file, change)
    with pytest.raises(CalibrationError, match=message) as caught:
        Statistics.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 2}, "found statistics of version 2, expected 1"),
        ({"runs": 3}, "header is damaged"),
        ({"runs": [{"settings": {"a": []}, "prompts": []}]}, "header is damaged"),
        ({"layers": ["x"]}, "header is damaged"),
        ({"layers": {Q: "nowhere"}}, "nowhere.step_amax: found nothing"),
        ({"fingerprints": None}, "header is damaged"),
    ],
)
def test_a_damaged_header(file: Path, header: dict[str, object], message: str) -> None:
    rewrite(file, **header)
    with pytest.raises(CalibrationError, match=message):
        Statistics.load(file)


def test_files_that_hold_no_statistics(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="file missing"):
        Statistics.load(tmp_path / "absent")
    (tmp_path / "text").write_text("a red circle\n")
    with pytest.raises(CalibrationError, match="cannot be read"):
        Statistics.load(tmp_path / "text")
    (tmp_path / "short").write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CalibrationError, match="cannot be read"):
        Statistics.load(tmp_path / "short")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match="without statistics"):
        Statistics.load(tmp_path / "weights")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    for target in (tmp_path / "absent" / "stats", tmp_path / "plain" / "stats"):
        with pytest.raises(OutputError, match="cannot be written"):
            statistics_of(1).save(target)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        statistics_of(1).save(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "plain"]
