"""Second moments: what is recorded, how it merges, and which files are refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omni_convert.convert.calibration import moments as moments_module
from omni_convert.convert.calibration.moments import METADATA_KEY, InputMoments, Moments, MomentsRecorder
from omni_convert.formats.errors import CalibrationError, OutputError
from omni_convert.formats.statistics.layer_statistics import observe
from omni_convert.formats.statistics.recording_header import CalibrationRun, Identity

Q, K, UP = "transformer.layers.0.to_q", "transformer.layers.0.to_k", "transformer.layers.0.up"


def noise(seed: int, width: int = 8, rows: int = 90) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def recorded(*batches: torch.Tensor) -> InputMoments:
    recorder = MomentsRecorder()
    for step, values in enumerate(batches):
        recorder.record(observe(values), step)
    found = recorder.moments()
    assert found is not None
    return found


def moments_of(seed: int, model: str = "a" * 64) -> Moments:
    run = CalibrationRun((("seed", 0), ("steps", 2)), (f"{seed:064x}",))
    attention = recorded(noise(seed), noise(seed + 100))
    layers = {Q: attention, K: attention, UP: recorded(noise(seed + 200, 16))}
    return Moments.recorded(Identity({"transformer": model}, (run,)), layers)


def read(moments: Moments, *stems: str) -> InputMoments:
    reader = moments.for_group("transformer", stems)
    assert reader is not None
    return reader()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs wider than 12 keep blocks of 5 only."""
    monkeypatch.setattr(moments_module, "MAX_FULL_WIDTH", 12)
    monkeypatch.setattr(moments_module, "BLOCK", 5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    moments_of(1).save(tmp_path / "moments.safetensors")
    return tmp_path / "moments.safetensors"


def test_all_of_a_narrow_input_and_only_blocks_of_a_wide_one(monkeypatch: pytest.MonkeyPatch, narrow: None) -> None:
    monkeypatch.setattr(moments_module, "TILE_ELEMENTS", 100)  # several tiles, the last one short
    first, second = noise(1, 12), noise(2, 12)
    both = torch.cat([first, second]).double()
    (full,) = recorded(first, second).blocks()
    torch.testing.assert_close(full.double(), both.T @ both, rtol=1e-5, atol=1e-4)
    wide = noise(3, 13)
    blocks = recorded(wide).blocks()
    assert [len(block) for block in blocks] == [5, 5, 3]
    start = 0
    for block in blocks:
        part = wide[:, start : start + len(block)].double()
        torch.testing.assert_close(block.double(), part.T @ part, rtol=1e-5, atol=1e-4)
        start += len(block)


def test_the_moments_of_some_columns_are_those_of_these_columns(narrow: None) -> None:
    rows = noise(1, 12)
    full = recorded(rows)
    found = full.columns(3, 12)
    torch.testing.assert_close(found.products, recorded(rows[:, 3:]).products)
    assert torch.equal(found.sample, full.sample[:, 3:])
    wide = recorded(noise(3, 13))
    first, rest = wide.columns(0, 5), wide.columns(5, 13)
    assert [*map(len, first.blocks()), *map(len, rest.blocks())] == [5, 5, 3]
    assert all(map(torch.equal, [*first.blocks(), *rest.blocks()], wide.blocks()))
    with pytest.raises(CalibrationError, match="moments in blocks of 5 columns, expected none that columns 0 to 5 cut"):
        wide.columns(0, 6)


def test_recording_again_gives_the_same_bits() -> None:
    first, second = recorded(noise(1), noise(2)), recorded(noise(1), noise(2))
    assert torch.equal(first.products, second.products)
    assert (first.count, second.count) == (180, 180)
    assert torch.equal(first.sample, second.sample)


def test_rows_that_are_held_out_leave_no_trace(narrow: None) -> None:
    for width in (8, 13):
        rows = noise(1, width)
        kept = recorded(rows).without(rows[:30])
        alone = recorded(rows[30:])
        torch.testing.assert_close(kept.products, alone.products, rtol=0, atol=1e-3)
        assert kept.count == alone.count


def test_a_file_holds_everything_and_shared_inputs_once(file: Path) -> None:
    before, after = moments_of(1), Moments.load(file)
    assert after.identity == before.identity
    assert dict(after.owners) == dict(before.owners) == {K: K, Q: K, UP: UP}
    assert {name.rpartition(".")[0] for name in load_file(file)} == {K, UP}
    for stem in ("layers.0.to_q", "layers.0.up"):
        first, second = read(before, stem), read(after, stem)
        assert torch.equal(first.products, second.products)
        assert torch.equal(first.sample, second.sample)
        assert first.count == second.count


def test_equal_moments_are_equal_bytes(file: Path, tmp_path: Path) -> None:
    for name, moments in (("again", moments_of(1)), ("copy", Moments.load(file))):
        moments.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == file.read_bytes()


def test_files_merge_to_the_same_bits_in_any_order(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        moments_of(seed).save(tmp_path / str(seed))
    parts = [Moments.load(tmp_path / str(seed)) for seed in (1, 2, 3)]
    merged = [first.merge(others) for first, *others in itertools.permutations(parts)]
    assert len({moments.fingerprint() for moments in merged}) == 1
    assert len({read(moments, "layers.0.up").products.numpy().tobytes() for moments in merged}) == 1
    assert all(moments.identity == merged[0].identity for moments in merged)
    together = recorded(*(noise(seed + 200, 16) for seed in (1, 2, 3)))
    up = read(merged[0], "layers.0.up")
    torch.testing.assert_close(up.products, together.products, rtol=1e-5, atol=1e-4)
    assert up.count == together.count
    assert torch.equal(up.sample, together.sample)


def test_a_group_counts_an_input_that_its_members_share_once() -> None:
    moments = moments_of(1)
    assert read(moments, "layers.0.to_q", "layers.0.to_k").count == 180
    assert moments.for_group("transformer", ("layers.0.to_q", "layers.0.to_v")) is None
    assert moments.for_group("transformer_2", ("layers.0.to_q",)) is None


def test_fingerprints_tell_recordings_apart(file: Path, tmp_path: Path) -> None:
    moments_of(2).save(tmp_path / "other")
    assert Moments.load(file).fingerprint() == Moments.load(file).fingerprint()
    assert Moments.load(file).fingerprint() != Moments.load(tmp_path / "other").fingerprint()


def test_moments_of_different_models_do_not_merge() -> None:
    with pytest.raises(CalibrationError, match="transformer: found statistics of different models"):
        moments_of(1).merge([moments_of(2, model="b" * 64)])


def rewrite(path: Path, change: dict[str, torch.Tensor] | None = None, **header: object) -> None:
    """Damages a file in a chosen way."""
    with safe_open(path, framework="pt") as opened:
        content = json.loads(opened.metadata()[METADATA_KEY]) | header
    save_file(load_file(path) | (change or {}), path, metadata={METADATA_KEY: json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "header", "message"),
    [
        ({f"{UP}.rows": torch.ones(3, 16)}, {}, "rows: found torch.float32"),
        ({f"{UP}.rows": torch.ones(65, 16, dtype=torch.bfloat16)}, {}, r"rows: found torch.bfloat16 \[65, 16\]"),
        ({f"{UP}.products": torch.ones(1, 16, 15)}, {}, "products: found"),
        ({f"{UP}.count": torch.ones(2, dtype=torch.int64)}, {}, "count: found"),
        ({}, {"version": 2}, "found moments of version 2, expected 1"),
        ({}, {"runs": 3}, "header is damaged"),
        ({}, {"layers": {Q: "nowhere"}}, "nowhere.rows: found nothing"),
    ],
)
def test_a_damaged_file_is_named(
    file: Path, change: dict[str, torch.Tensor], header: dict[str, object], message: str
) -> None:
    rewrite(file, change, **header)
    with pytest.raises(CalibrationError, match=message) as caught:
        Moments.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_values_are_found_when_they_are_read(file: Path) -> None:
    rewrite(file, {f"{UP}.products": torch.full((1, 16, 16), torch.nan)})
    with pytest.raises(CalibrationError, match="NaN, Inf or no rows"):
        read(Moments.load(file), "layers.0.up")


def test_files_that_hold_no_moments(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="absent"):
        Moments.load(tmp_path / "absent")
    (tmp_path / "short").write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CalibrationError, match="short"):
        Moments.load(tmp_path / "short")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match="without moments"):
        Moments.load(tmp_path / "weights")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "absent" / "moments", tmp_path / "plain" / "moments", tmp_path / "folder"):
        with pytest.raises(OutputError):
            moments_of(1).save(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "plain"]
