"""scripts/bench_cuda.py builds its layers and blocks, prints a line for each, and says so where there is no GPU."""

import bench_cuda
import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_fails(capsys):
    assert bench_cuda.main([]) == 1
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers|transformers")
def test_every_part_runs_and_shows_errors_beside_speeds(capsys):
    assert bench_cuda.main(["--device", "cpu", "--tiny", "--runs", "1", "--no-compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in (
        "copy",
        "fp8 per token and 128",
        "fp8 static:",
        "int8: int_mm",
        "mxfp4_dualscale: ",
        "Wan: fp8 static",
    ):
        assert any(line.startswith(start) for line in lines), start
    errors = {line.split(":")[1].split()[0]: float(line.split()[-1]) for line in lines if line.startswith("FLUX")}
    assert errors["bf16"] == 0
    assert all(0 < errors[method] < 10 for method in ("fp8", "int8"))


@pytest.mark.parametrize(("found", "shown"), [(1.49, "<1.50"), (1.5, "1.50")])
def test_a_figure_below_what_is_asked_is_marked(found, shown):
    assert bench_cuda.verdict(found, 1.5, "{:.2f}") == shown


def test_unknown_parts_are_refused():
    with pytest.raises(SystemExit):
        bench_cuda.main(["--parts", "lunch"])
