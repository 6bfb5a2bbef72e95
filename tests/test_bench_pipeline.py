"""scripts/bench_pipeline.py prints speed and error of every candidate."""

import argparse
import re
import sys

import bench_pipeline
import pytest
import torch
from diffusers import FluxTransformer2DModel

LINE = re.compile(r"^(\w+) +(\S.*?) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers|transformers")
def test_the_demo_is_measured_beside_bf16(monkeypatch, capsys):
    arguments = ["--models", "demo", "--methods", "int8", "--steps", "2", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_pipeline.py", *arguments])
    bench_pipeline.main()
    lines = {name: figures for model, name, *figures in LINE.findall(capsys.readouterr().out) if model == "demo"}
    assert lines["bf16"][1] == "1.00"
    errors = {name.split()[0]: float(error) for name, (*_, error) in lines.items()}
    assert 0 < errors["bf16"] < errors["int8"] < 5


def test_errors_of_a_block_are_those_of_its_formats(capsys):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    options = argparse.Namespace(methods="int8,mxfp4", device="cpu", compile=False, runs=1)
    with torch.inference_mode():
        bench_pipeline.compare("tiny", *bench_pipeline.block(model, inputs, options), options)
    errors = {name.split()[0]: float(error) for _, name, *_, error in LINE.findall(capsys.readouterr().out)}
    assert 0 < errors["bf16"] < errors["int8"] < errors["mxfp4"]
