"""The manifest identifies the source on any machine, and says nothing about this one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.output.manifest import describe_job
from omni_convert.convert.plan.plan import plan_conversion
from omni_convert.convert.source.location import resolve_source

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify source"])
def test_the_source_is_its_size_and_header_and_its_hash_if_asked_for(
    tiny_pipeline_folder: Path, tmp_path: Path, verify: bool
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(verify_source=verify))
    manifest = json.loads((tmp_path / "out" / "omni_convert.json").read_text())
    content = (tiny_pipeline_folder / "transformer" / WEIGHTS).read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    expected = {"bytes": len(content), "header_sha256": hashlib.sha256(header).hexdigest()}
    expected |= {"sha256": hashlib.sha256(content).hexdigest()} if verify else {}
    assert manifest["components"]["transformer"]["source_files"] == {WEIGHTS: expected}


def test_the_time_of_the_source_is_in_the_journal_alone(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    jobs, manifests = [], []
    for time in (1_000_000_000, 2_000_000_000):
        source = tmp_path / str(time) / "source"
        shutil.copytree(tiny_pipeline_folder, source)
        os.utime(source / "transformer" / WEIGHTS, (time, time))
        jobs.append(describe_job(plan_conversion(resolve_source(source), Recipe()))["source"])
        convert_checkpoint(source, tmp_path / str(time) / "out")
        manifests.append((tmp_path / str(time) / "out" / "omni_convert.json").read_bytes())
    key = f"transformer/{WEIGHTS}"
    assert [job[key][-1] for job in jobs] == [1_000_000_000 * 10**9, 2_000_000_000 * 10**9]
    assert jobs[0][key][:-1] == jobs[1][key][:-1]
    assert manifests[0] == manifests[1]
