import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from omni_convert.formats.containers.imatrix import read_imatrix
from omni_convert.formats.errors import CheckpointError

SUMS = np.array([[2.0, 0.0, 8.0]], dtype=np.float32)


def in_gguf(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def counts(number: float, rows: int = 1) -> np.ndarray:
    return np.full((rows, 1), number, dtype=np.float32)


def legacy_entry(name: bytes, calls: int, values: list[float]) -> bytes:
    return struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name, calls, len(values), *values)


def test_an_importance_is_the_mean_of_squares(tmp_path: Path) -> None:
    path = in_gguf(
        tmp_path / "a.gguf",
        {
            "a.weight.in_sum2": SUMS,
            "a.weight.counts": counts(4),
            "model.diffusion_model.b.weight.in_sum2": SUMS,
            "model.diffusion_model.b.weight.counts": counts(0),
            "experts.weight.in_sum2": SUMS.repeat(2, axis=0),
            "experts.weight.counts": counts(4, rows=2),
        },
    )
    found = read_imatrix(path)
    assert found.keys() == {"a.weight", "b.weight"}
    assert found["a.weight"].tolist() == [0.5, 0.0, 2.0]
    assert found["b.weight"].tolist() == [1.0, 1.0, 1.0]  # nothing was counted


def test_legacy_files_are_read(tmp_path: Path) -> None:
    entries = legacy_entry(b"a.weight", 2, [1.0, 0.0, 4.0]) + legacy_entry(b"b.weight", 0, [5.0])
    dataset = b"wiki.txt"
    (tmp_path / "a.dat").write_bytes(
        struct.pack("<i", 2) + entries + struct.pack(f"<ii{len(dataset)}s", 7, len(dataset), dataset)
    )
    found = read_imatrix(tmp_path / "a.dat")
    assert found["a.weight"].tolist() == [0.5, 0.0, 2.0]
    assert found["b.weight"].tolist() == [1.0]
    assert found["a.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGU",
        struct.pack("<i", 1),
        struct.pack("<i", 2**31 - 1) + legacy_entry(b"a.weight", 1, [1.0]),
        struct.pack("<ii", 1, -1),
        struct.pack("<ii", 1, 2**30),
        struct.pack("<i", 1) + legacy_entry(b"a.weight", 1, [1.0])[:-1],
        struct.pack("<ii8sii", 1, 8, b"a.weight", 1, 2**30),
        struct.pack("<ii8sii", 1, 8, b"a.weight", 1, -4),
        struct.pack("<i", 1) + legacy_entry(b"a.weight", 1, [float("nan")]),
        struct.pack("<i", 1) + legacy_entry(b"a.weight", 1, [-1.0]),
        b"GGUF" + bytes(64),
    ],
)
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="a: "):
        read_imatrix(tmp_path / "a")


def test_gguf_files_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected an importance matrix"):
        read_imatrix(in_gguf(tmp_path / "a.gguf", {"a.weight": SUMS}))
    with pytest.raises(CheckpointError, match=r"without 'a\.weight\.counts'"):
        read_imatrix(in_gguf(tmp_path / "b.gguf", {"a.weight.in_sum2": SUMS}))
    with pytest.raises(CheckpointError):
        read_imatrix(tmp_path / "missing")
