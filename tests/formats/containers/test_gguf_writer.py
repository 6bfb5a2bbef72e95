import hashlib
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from omni_convert.formats.containers.gguf_writer import GgufFile, GgufWriter
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.schemes.gguf import Gguf

WEIGHT = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
STORED = Gguf("Q4_0").quantize(WEIGHT)["weight"]
CONV = torch.arange(2 * 3 * 1 * 2 * 2, dtype=torch.float32).view(2, 3, 1, 2, 2)
TENSORS: dict[str, Tensor] = {"bias": torch.ones(5), "a.weight": STORED, "conv.weight": CONV, "last": torch.ones(1)}
SPECS = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
CONTENT = GgufFile("flux", "Q4_0", {"a.weight": ("Q4_0", (5, 64))})


def written(path: Path) -> str:
    """Writes the file, rows of the weight backwards; its SHA-256 as the writer says."""
    with GgufWriter(path, SPECS, CONTENT) as writer:
        for name in ("last", "conv.weight", "bias"):
            writer.write(name, TENSORS[name])
            writer.hash_written()
        for row in reversed(range(5)):
            writer.write_rows("a.weight", row, STORED[row : row + 1])
        return writer.sha256()


def test_the_reader_of_the_gguf_package_finds_every_tensor(tmp_path: Path) -> None:
    written(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == ["bias", "a.weight", "conv.weight", "last"]
    assert torch.equal(torch.from_numpy(found["a.weight"].data.copy()), STORED)
    assert torch.equal(torch.from_numpy(found["conv.weight"].data.copy()), CONV)
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert reader.get_field("general.quantization_version").contents() == 2
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_the_file_is_the_one_that_the_gguf_package_writes(tmp_path: Path) -> None:
    written(tmp_path / "ours.gguf")
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "flux")
    theirs.add_quantization_version(2)
    theirs.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for name, tensor in TENSORS.items():
        kind = gguf.GGMLQuantizationType.Q4_0 if name == "a.weight" else None
        theirs.add_tensor(name, tensor.numpy(), raw_dtype=kind)
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_the_hash_is_that_of_the_file_with_its_padding(tmp_path: Path) -> None:
    sha256 = written(tmp_path / "a.gguf")
    assert sha256 == hashlib.sha256((tmp_path / "a.gguf").read_bytes()).hexdigest()


def test_an_unfinished_file_is_read_by_nobody_and_can_be_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = GgufWriter(path, SPECS, CONTENT)
    writer.write("bias", TENSORS["bias"])
    writer.detach()
    with pytest.raises(ValueError, match="magic"):
        gguf.GGUFReader(path)
    with GgufWriter(path, SPECS, CONTENT, resume=True) as again:
        assert again.read_back("bias", 0, 5) == TENSORS["bias"].numpy().tobytes()
        again.adopt("bias", 0, 5)
        for name in ("a.weight", "conv.weight", "last"):
            again.write(name, TENSORS[name])
    written(tmp_path / "b.gguf")
    assert path.read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_file_with_other_tensors_than_planned_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.gguf")
    CONTENT.check(tmp_path / "a.gguf", SPECS)
    with pytest.raises(CheckpointError, match=r"found other tensors than planned, first last"):
        CONTENT.check(tmp_path / "a.gguf", SPECS[:-1])


def test_a_dtype_that_gguf_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'mask': found torch.bool, expected a type that GGUF has"):
        GgufWriter(tmp_path / "a.gguf", [TensorSpec("mask", torch.bool, (2,))], CONTENT)
