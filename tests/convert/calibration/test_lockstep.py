"""Prompts that share the blocks of a streamed model compute what each computes alone."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omni_convert.convert.calibration.lockstep import Lockstep
from omni_convert.loaders.memory.mapped_file import MappedFile
from omni_convert.loaders.memory.streaming import StoredTensor, Streamer

WIDTH, BLOCKS = 32, 4
BLOCK_BYTES = 4 * WIDTH * WIDTH


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def stream_into(streamer: Streamer, component: str, file: Path, *, repeats: bool) -> Denoiser:
    torch.manual_seed(len(component))
    save_file(Denoiser().state_dict(), file)
    mapped = MappedFile(file)
    with torch.device("meta"):
        model = Denoiser().requires_grad_(False)
    tensors = [
        StoredTensor(((model.get_submodule(name.rpartition(".")[0]), "weight"),), mapped, name, torch.float32)
        for name in mapped.specs
    ]
    streamer.add(component, model, tensors, repeats=repeats)
    return model


@pytest.fixture
def models(tmp_path: Path) -> tuple[Streamer, Denoiser, Denoiser]:
    streamer = Streamer(torch.device("cpu"))
    encoder = stream_into(streamer, "text_encoder", tmp_path / "a.safetensors", repeats=False)
    return streamer, encoder, stream_into(streamer, "transformer", tmp_path / "b.safetensors", repeats=True)


def job_of(models: tuple[Streamer, Denoiser, Denoiser], seed: int, steps: int) -> Callable[[], Tensor]:
    _, encoder, denoiser = models

    def job() -> Tensor:
        x: Tensor = encoder(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed)))
        for _ in range(steps):
            x = x + denoiser(x)
        return x

    return job


def test_each_block_is_read_once_a_call_for_all_prompts(models: tuple[Streamer, Denoiser, Denoiser]) -> None:
    streamer = models[0]
    jobs = [job_of(models, seed, steps=3) for seed in range(4)]
    alone = [job() for job in jobs]
    streamer.read_bytes = dict.fromkeys(streamer.read_bytes, 0)
    together = Lockstep[Tensor](streamer).run(jobs)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert streamer.groups == [4]
    assert streamer.read_bytes == {
        "text_encoder": BLOCKS * BLOCK_BYTES,
        "transformer": 3 * BLOCKS * BLOCK_BYTES,
    }
    assert streamer.gate is None


def test_prompts_may_differ_in_their_number_of_calls(models: tuple[Streamer, Denoiser, Denoiser]) -> None:
    jobs = [job_of(models, seed, steps) for seed, steps in enumerate((1, 4, 2, 0))]
    alone = [job() for job in jobs]
    together = Lockstep[Tensor](models[0]).run(jobs)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_a_group_holds_what_memory_has_room_for(
    models: tuple[Streamer, Denoiser, Denoiser], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamer = models[0]
    jobs = [job_of(models, seed, steps=2) for seed in range(5)]
    alone = [job() for job in jobs]
    streamer.read_bytes = dict.fromkeys(streamer.read_bytes, 0)
    input_bytes = 4 * 2 * WIDTH
    monkeypatch.setattr(Streamer, "room", lambda _: (24 + 2 * 4) * input_bytes)
    finished: list[list[int]] = []
    together = Lockstep[Tensor](streamer, lambda group: finished.append(list(group))).run(jobs)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert finished == [[0, 1], [2, 3], [4]]
    assert streamer.groups == [2, 2, 1]
    assert streamer.read_bytes == {
        "text_encoder": BLOCKS * BLOCK_BYTES,
        "transformer": 3 * 2 * BLOCKS * BLOCK_BYTES,
    }


def test_one_failure_ends_all(models: tuple[Streamer, Denoiser, Denoiser]) -> None:
    def fail() -> Tensor:
        job_of(models, 9, steps=1)()
        raise ValueError("a prompt that fails")

    with pytest.raises(ValueError, match="a prompt that fails"):
        Lockstep[Tensor](models[0]).run([job_of(models, 1, steps=9), fail, job_of(models, 2, steps=9)])
    assert "prompt" not in {thread.name for thread in threading.enumerate()}
    assert models[0].gate is None


def test_an_interruption_ends_all(models: tuple[Streamer, Denoiser, Denoiser]) -> None:
    def interrupt() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Lockstep[Tensor](models[0]).run([job_of(models, 1, steps=2), interrupt])


def test_no_prompts_give_no_results(models: tuple[Streamer, Denoiser, Denoiser]) -> None:
    assert Lockstep[Tensor](models[0]).run([]) == []
