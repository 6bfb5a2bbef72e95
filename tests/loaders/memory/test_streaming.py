"""Parts of a model are in memory while they run, and no longer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omni_convert.formats.errors import RecipeError
from omni_convert.loaders.memory import budget
from omni_convert.loaders.memory.budget import MemoryChoice, available_memory
from omni_convert.loaders.memory.mapped_file import MappedFile
from omni_convert.loaders.memory.streaming import StoredTensor, Streamer, repeated_blocks

CPU = torch.device("cpu")
WIDTH, BLOCKS = 64, 5
BLOCK_BYTES = 4 * WIDTH * (WIDTH + 1)


class Chain(nn.Module):
    """Two lists of blocks, one of them with a list inside, between layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.groups = nn.ModuleList([nn.Sequential(nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH)})["a"])])
        self.plain = nn.ModuleList([nn.ModuleList([nn.Identity()])])
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in (*self.blocks, *self.groups):
            x = torch.relu(block(x))
        output: Tensor = self.last(x)
        return output


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Chain, MappedFile]:
    torch.manual_seed(0)
    model = Chain().requires_grad_(False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return model, MappedFile(tmp_path / "model.safetensors")


def streamed(file: MappedFile, dtype: torch.dtype) -> tuple[Chain, Streamer]:
    with torch.device("meta"):
        model = Chain().requires_grad_(False)
    streamer = Streamer(CPU)
    tensors = [
        StoredTensor(((model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]),), file, name, dtype)
        for name in file.specs
    ]
    streamer.add("transformer", model, tensors, repeats=True)
    return model, streamer


def present_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.parameters() if not tensor.is_meta)


def test_blocks_are_the_called_entries_of_outermost_lists() -> None:
    assert list(repeated_blocks(Chain())) == [*(f"blocks.{place}" for place in range(BLOCKS)), "groups.0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_streamed_model_computes_what_it_computes_in_memory(
    stored: tuple[Chain, MappedFile], dtype: torch.dtype
) -> None:
    resident, file = stored
    model, streamer = streamed(file, dtype)
    x = torch.randn(3, WIDTH).to(dtype)
    expected = resident.to(dtype)(x)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert streamer.read_bytes == {"transformer": (2 * (BLOCKS + 1) + 2) * BLOCK_BYTES}


def test_copies_of_one_block_and_the_rest_are_in_memory(stored: tuple[Chain, MappedFile]) -> None:
    model, streamer = streamed(stored[1], torch.float64)
    seen: list[int] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(present_bytes(model)))
    assert present_bytes(model) == 0
    model(torch.randn(3, WIDTH).double())
    assert max(seen) == (2 + 1) * 2 * BLOCK_BYTES
    streamer.release()
    assert present_bytes(model) == 0


def test_another_model_is_given_up_before_one_runs(stored: tuple[Chain, MappedFile]) -> None:
    model, streamer = streamed(stored[1], torch.float64)
    given_up: list[tuple[str, str]] = []
    streamer.at_give_up = lambda part: given_up.append((part.component, part.block))
    vae = nn.Linear(2, 2)
    streamer.watch("vae", vae)
    model(torch.randn(3, WIDTH).double())
    assert given_up == [("transformer", f"blocks.{place}") for place in range(BLOCKS)]
    vae(torch.zeros(2))
    assert given_up[BLOCKS:] == [("transformer", "groups.0"), ("transformer", "")]
    assert present_bytes(model) == 0


def test_a_streamed_model_says_where_it_runs(stored: tuple[Chain, MappedFile]) -> None:
    model, _ = streamed(stored[1], torch.float64)
    assert model.device == CPU
    assert type(model).__name__ == "Chain"
    assert isinstance(model, Chain)


def test_pages_that_are_given_up_come_back(stored: tuple[Chain, MappedFile]) -> None:
    model, file = stored
    view = file.tensor("first.weight")
    for act in (file.read, file.give_up, file.read_ahead, file.give_up):
        act("first.weight")
        assert torch.equal(view, model.first.weight)


def resident_kilobytes(path: Path) -> int:
    """What this process holds of a mapped file."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begins = [place for place, line in enumerate(lines) if line.endswith(str(path))]
    sizes = (next(line for line in lines[begin:] if line.startswith("Rss:")) for begin in begins)
    return sum(int(size.split()[1]) for size in sizes)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not say what is mapped")
def test_a_part_that_is_given_up_leaves_the_memory_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({"weight": torch.ones(1 << 20)}, path)
    file = MappedFile(path)
    file.read("weight")
    assert resident_kilobytes(path) >= 4096
    file.give_up("weight")
    assert resident_kilobytes(path) <= 64
    assert file.tensor("weight").sum() == 1 << 20
    assert resident_kilobytes(path) >= 4096


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", MemoryChoice("auto")),
        ("full", MemoryChoice("full")),
        ("stream", MemoryChoice("stream")),
        ("stream:2.5", MemoryChoice("stream", 2_500_000_000)),
    ],
)
def test_a_choice_of_memory_is_parsed(text: str, expected: MemoryChoice) -> None:
    assert MemoryChoice.parse(text) == expected


@pytest.mark.parametrize("text", ["", "stream:", "stream:-1", "stream:1GB", "full:3", "whole"])
def test_another_choice_of_memory_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError, match="expected auto, full, stream or stream:GB"):
        MemoryChoice.parse(text)


def test_auto_streams_what_leaves_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 10485760 kB\n")  # 10 GiB
    monkeypatch.setattr(budget, "MEMINFO", meminfo)
    monkeypatch.setattr(budget, "CGROUPS", ())
    assert available_memory(CPU) == 10 << 30
    assert not MemoryChoice("auto").streams({"transformer": 8 << 30}, CPU)
    assert MemoryChoice("auto").streams({"transformer": 9 << 30}, CPU)
    assert not MemoryChoice("full").streams({"transformer": 90 << 30}, CPU)
    assert MemoryChoice("stream").streams({"transformer": 1}, CPU)


def test_a_container_limits_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "max").write_text("3000000\n")
    (tmp_path / "stat").write_text("anon 1000000\nfile 77\n")
    monkeypatch.setattr(budget, "CGROUPS", ((tmp_path / "max", tmp_path / "stat", "anon"),))
    assert available_memory(CPU) == 2_000_000
