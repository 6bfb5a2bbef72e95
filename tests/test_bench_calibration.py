"""The benchmark of calibration."""

from __future__ import annotations

import json
from pathlib import Path

import bench_calibration as bench
import pytest

ROOT = Path(__file__).parent.parent
FLUX = ROOT / "tests/data/flux"


def test_each_form_is_listed_once_after_the_one_that_it_is_held_to() -> None:
    for method in ("mxfp4", "fp8"):
        found = list(bench.forms(method, [(1, 20), (40, 20)], 20, bench.KINDS))
        assert found[0] == bench.reference_form(method, 20)
        assert len(set(found)) == len(found)
    assert {form.kind for form in bench.forms("mxfp4", [(8, 4)], 20, bench.KINDS)} >= {"bound", *bench.KINDS}


def test_gains_are_paired() -> None:
    gain, error = bench.paired_gain([10.0, 1000.0], [1.0, 100.0])
    assert gain == pytest.approx(10.0)
    assert error == pytest.approx(0.0)


def test_finished_rows_are_read_and_not_measured_again(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    judged = bench.Bench.of(str(FLUX), tmp_path, images=2)
    plain, calibrated = bench.Form("mxfp4", "plain"), bench.Form("mxfp4", "calibrated", 8, 20)
    rows = {
        f"{plain.key}, 2 images": {"images": [4.0, 4.0], "steps": [0.04, 0.04]},
        f"{calibrated.key}, 2 images": {"images": [2.0, 2.0], "steps": [0.4, 0.4]},
    }
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert judged.report(calibrated, plain)
    assert "+3.01" in (printed := capsys.readouterr().out)
    assert "-10.00" in printed
