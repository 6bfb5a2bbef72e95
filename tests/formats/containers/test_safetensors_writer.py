from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.containers.safetensors_writer import SafetensorsWriter
from omni_convert.formats.containers.tensor_spec import TORCH_DTYPES, TensorSpec
from omni_convert.formats.errors import CheckpointError, OutputError

E4M3 = torch.float8_e4m3fn
DTYPES = list(TORCH_DTYPES.values())
FUZZ_EXAMPLES = int(os.environ.get("OMNI_CONVERT_FUZZ_EXAMPLES", "500")) // 5


def specs_of(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    """In the order of safetensors' own writer: by dtype, then by name."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return sorted(specs, key=lambda spec: (-DTYPES.index(spec.dtype), spec.name))


def written(path: Path, tensors: Mapping[str, Tensor]) -> bytes:
    with SafetensorsWriter(path, specs_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path.read_bytes()


def assert_unreadable(path: Path) -> None:
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any dtype, scalars and empty ones too, of random bytes; names of any text."""
    names = draw(st.lists(st.text(max_size=6).filter(lambda name: name != "__metadata__"), unique=True, max_size=6))
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        size = TensorSpec(name, dtype, tuple(shape)).nbytes
        content = draw(st.binary(min_size=size, max_size=size))
        if dtype is torch.bool:
            content = bytes(byte % 2 for byte in content)
        tensors[name] = torch.tensor(list(content), dtype=torch.uint8).view(dtype).reshape(shape)
    return tensors


@settings(
    max_examples=FUZZ_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tensors=state_dicts(), data=st.data())
def test_bytes_are_those_of_save_file_in_whatever_order_rows_arrive(
    tmp_path: Path, tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    path = tmp_path / "a.safetensors"
    path.unlink(missing_ok=True)
    pieces: list[tuple[str, int | None, Tensor]] = []
    for name, tensor in tensors.items():
        if not tensor.dim() or data.draw(st.booleans()):
            pieces.append((name, None, tensor))
            continue
        cuts = data.draw(st.lists(st.integers(0, tensor.shape[0]), max_size=3).map(sorted))
        bounds = [0, *cuts, tensor.shape[0]]
        pieces += [(name, start, tensor[start:stop]) for start, stop in pairwise(bounds)]
    with SafetensorsWriter(path, specs_of(tensors)) as writer:
        for name, start, piece in data.draw(st.permutations(pieces)):
            if start is None:
                writer.write(name, piece)
            else:
                writer.write_rows(name, start, piece)
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})


def test_tensors_lie_in_the_order_given(tmp_path: Path) -> None:
    specs = [TensorSpec(name, dtype, (4,)) for name, dtype in (("b", torch.uint8), ("c", torch.float32), ("a", E4M3))]
    with SafetensorsWriter(tmp_path / "a.safetensors", specs) as writer:
        for spec in specs:
            writer.write(spec.name, torch.zeros(4, dtype=spec.dtype))
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert list(file.specs.values()) == specs


def test_wide_tensors_come_first_where_the_order_given_would_leave_them_unaligned(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.bfloat16)}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(tmp_path / "a.safetensors", specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert list(file.specs) == ["b", "c", "a"]
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("metadata", [None, {}, {"note": 'é\n"\\\x01\x7f'}], ids=str)
def test_other_metadata(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, [TensorSpec("a", torch.float32, (1,))], metadata) as writer:
        writer.write("a", torch.ones(1))
    assert path.read_bytes() == save({"a": torch.ones(1)}, metadata=metadata)


def test_a_tensor_may_be_a_view_or_need_a_gradient(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    wave = torch.tensor([1 + 2j, 3 - 4j])
    with SafetensorsWriter(tmp_path / "a.safetensors", specs_of({"t": weight.T, "g": weight, "w": wave})) as writer:
        writer.write("t", weight.T)
        writer.write("g", weight.clone().requires_grad_())
        writer.write("w", wave.conj())
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.read("t"), weight.T)
        assert torch.equal(file.read("g"), weight)
        assert torch.equal(file.read("w"), torch.tensor([1 - 2j, 3 + 4j]))


@pytest.fixture
def writer(tmp_path: Path) -> SafetensorsWriter:
    """Open, with a matrix `w` of float32 [4, 2] and a scalar `s`."""
    specs = [TensorSpec("w", torch.float32, (4, 2)), TensorSpec("s", torch.float32, ())]
    return SafetensorsWriter(tmp_path / "a.safetensors", specs)


@pytest.mark.parametrize(
    "tensor", [torch.ones(4, 2, dtype=torch.float16), torch.ones(2, 4), torch.ones(8), torch.ones(())], ids=str
)
def test_another_tensor_than_declared_is_refused(writer: SafetensorsWriter, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=r"tensor 'w': given .* declared torch.float32 \[4, 2\]"):
        writer.write("w", tensor)
    with pytest.raises(KeyError):
        writer.write("unknown", tensor)


@pytest.mark.parametrize(
    ("name", "first_row", "rows"),
    [
        ("w", 0, torch.ones(1, 2, dtype=torch.bfloat16)),
        ("w", 0, torch.ones(1, 3)),
        ("w", 0, torch.ones(2)),
        ("w", 3, torch.ones(2, 2)),
        ("w", -1, torch.ones(1, 2)),
        ("w", 0, torch.ones(())),
        ("s", 0, torch.ones(())),
        ("s", 0, torch.ones(1)),
    ],
    ids=["dtype", "columns", "flat", "past the end", "before the start", "scalar", "no rows", "row of a scalar"],
)
def test_rows_that_do_not_belong_are_refused(
    writer: SafetensorsWriter, name: str, first_row: int, rows: Tensor
) -> None:
    with pytest.raises(ValueError, match=f"tensor '{name}': given"):
        writer.write_rows(name, first_row, rows)


def test_a_missing_byte_is_named_and_leaves_no_readable_file(writer: SafetensorsWriter) -> None:
    writer.write("s", torch.ones(()))
    writer.write_rows("w", 0, torch.ones(1, 2))
    writer.write_rows("w", 2, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="tensor 'w': 8 of 32 bytes were never written"):
        writer.close()
    assert_unreadable(writer.path)


@pytest.mark.parametrize(("first_row", "count"), [(0, 4), (1, 1), (0, 2), (2, 2), (1, 2)])
def test_bytes_written_twice_are_refused_and_the_file_with_them(
    writer: SafetensorsWriter, first_row: int, count: int
) -> None:
    writer.write("s", torch.ones(()))
    writer.write_rows("w", 1, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"tensor 'w': bytes .* written twice"):
        writer.write_rows("w", first_row, torch.ones(count, 2))
    writer.write_rows("w", 0, torch.ones(1, 2))
    writer.write_rows("w", 3, torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="tensor 'w' was written twice"):
        writer.close()
    assert_unreadable(writer.path)


def test_an_exception_leaves_no_readable_file_even_if_all_is_written(writer: SafetensorsWriter) -> None:
    def write_and_fail() -> None:
        with writer:
            writer.write("s", torch.ones(()))
            writer.write("w", torch.ones(4, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert_unreadable(writer.path)
    writer.close()  # nothing left to finish
    assert_unreadable(writer.path)


def test_a_killed_process_leaves_no_readable_file(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; "
        "from omni_convert.formats.containers.safetensors_writer import SafetensorsWriter; "
        "from omni_convert.formats.containers.tensor_spec import TensorSpec; "
        "writer = SafetensorsWriter(Path(sys.argv[1]), [TensorSpec('w', torch.float32, (4,))]); "
        "writer.write('w', torch.ones(4)); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "a.safetensors"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.stat().st_size > 16
    assert_unreadable(path)


def test_nothing_is_written_after_close(writer: SafetensorsWriter) -> None:
    with writer:
        writer.write("s", torch.ones(()))
        writer.write("w", torch.ones(4, 2))
    finished = writer.path.read_bytes()
    with pytest.raises(ValueError, match="after close"):
        writer.write("s", torch.zeros(()))
    assert writer.path.read_bytes() == finished


def test_names_are_unique_and_not_the_metadata(tmp_path: Path) -> None:
    spec, reserved = (TensorSpec(name, torch.float32, (1,)) for name in ("a", "__metadata__"))
    for specs in ([spec, spec], [reserved]):
        with pytest.raises(ValueError, match="declared twice or reserved"):
            SafetensorsWriter(tmp_path / "a.safetensors", specs)
    assert not list(tmp_path.iterdir())


def test_threads_write_what_one_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(64, 33, generator=generator).bfloat16() for i in range(8)}
    pieces = [(name, start) for start in range(0, 64, 4) for name in tensors]
    with SafetensorsWriter(tmp_path / "a.safetensors", specs_of(tensors)) as writer, ThreadPoolExecutor(8) as pool:
        for future in [
            pool.submit(writer.write_rows, name, start, tensors[name][start : start + 4]) for name, start in pieces
        ]:
            future.result()
    assert (tmp_path / "a.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_a_write_under_way_keeps_its_file_open_when_the_writer_is_left(writer: SafetensorsWriter) -> None:
    in_use = writer._descriptor
    assert in_use is not None
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    number = in_use.number
    assert os.path.samestat(os.fstat(number), writer.path.stat())
    del in_use
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_an_existing_file_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"a\.safetensors: cannot be created \(File exists\)"):
        SafetensorsWriter(path, [TensorSpec("a", torch.float32, (1,))])
    assert path.read_bytes() == b"precious"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be created"):
        SafetensorsWriter(tmp_path / "none" / "a.safetensors", [TensorSpec("a", torch.float32, (1,))])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows, or is written, beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_known_before_the_first_tensor(tmp_path: Path) -> None:
    with (
        file_size_limit(1 << 20),
        pytest.raises(OutputError, match=r"a\.safetensors: cannot be written \(File too large\), expected room for"),
    ):
        SafetensorsWriter(tmp_path / "a.safetensors", [TensorSpec("a", torch.uint8, (2 << 20,))])


def test_a_write_that_stops_half_way_is_an_error_and_leaves_no_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer = SafetensorsWriter(path, [TensorSpec("a", torch.uint8, (2 << 20,))])
    with file_size_limit(1 << 20), pytest.raises(OutputError, match="free some space or name another --output"):
        writer.write("a", torch.ones(2 << 20, dtype=torch.uint8))
    content = path.read_bytes()
    assert content[1 << 19 : 1 << 20] == b"\1" * (1 << 19)  # the system took this much in one call, and no more
    assert not any(content[1 << 20 :])
    with pytest.raises(RuntimeError, match=r"tensor 'a': .* never written"):
        writer.close()
    assert_unreadable(path)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; "
        "from omni_convert.formats.errors import OutputError; "
        "from omni_convert.formats.containers.safetensors_writer import SafetensorsWriter; "
        "from omni_convert.formats.containers.tensor_spec import TensorSpec\n"
        "try: SafetensorsWriter(Path(sys.argv[1]), [TensorSpec('a', torch.uint8, (2 << 20,))])\n"
        "except OutputError as error: print(error)"
    )
    mount = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}/a.safetensors"'
    namespace = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system gives no mount namespace for a small disk")
    result = subprocess.run([*namespace, "sh", "-c", mount, code], check=True, capture_output=True, text=True)
    assert "a.safetensors: cannot be written (No space left on device), expected room for 20" in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_others_may_join_a_file_that_its_creator_closes(tmp_path: Path, writer: SafetensorsWriter) -> None:
    specs = [TensorSpec("w", torch.float32, (4, 2)), TensorSpec("s", torch.float32, ())]
    for first_row in (0, 2):
        other = SafetensorsWriter(writer.path, specs, join=True)
        other.write_rows("w", first_row, torch.full((2, 2), float(first_row)))
        other.detach()
        writer.adopt("w", first_row, first_row + 2)
    writer.write("s", torch.tensor(5.0))
    writer.close()
    loaded = load_file(writer.path)
    assert torch.equal(loaded["w"], torch.tensor([[0.0, 0.0]] * 2 + [[2.0, 2.0]] * 2))
    assert torch.equal(loaded["s"], torch.tensor(5.0))


def test_there_is_nothing_to_join_where_the_disk_is_another(tmp_path: Path, writer: SafetensorsWriter) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    with pytest.raises(OutputError, match="a file system that all machines share") as caught:
        SafetensorsWriter(elsewhere, [TensorSpec("w", torch.float32, (4, 2))], join=True)
    assert "\n" not in str(caught.value)
    assert not elsewhere.exists()
    before = writer.path.read_bytes()
    with pytest.raises(OutputError, match="a file system that all machines share"):
        SafetensorsWriter(writer.path, [TensorSpec("other", torch.float32, (4, 2))], join=True)
    assert writer.path.read_bytes() == before


@pytest.fixture
def complete(writer: SafetensorsWriter) -> SafetensorsWriter:
    writer.write_rows("w", 2, torch.ones(2, 2))
    writer.write_rows("w", 0, torch.zeros(2, 2))
    writer.write("s", torch.tensor(5.0))
    return writer


def test_hashing_gives_the_hash_of_the_file_and_a_checksum_of_each_piece(complete: SafetensorsWriter) -> None:
    sha256 = complete.sha256()
    assert complete.checksum("w", 0, 2) == zlib.crc32(bytes(16))
    assert complete.checksum("w", 2, 4) == zlib.crc32(torch.ones(2, 2).numpy().tobytes())
    assert complete.checksum("s", 0, 1) == zlib.crc32(torch.tensor(5.0).numpy().tobytes())
    complete.close()
    assert hashlib.sha256(complete.path.read_bytes()).hexdigest() == sha256


def test_hashing_follows_writing(writer: SafetensorsWriter) -> None:
    writer.write_rows("w", 2, torch.ones(2, 2))
    writer.hash_written()  # the header; the rows before are missing
    writer.write_rows("w", 0, torch.zeros(2, 2))
    writer.hash_written()
    assert writer.checksum("w", 2, 4) == zlib.crc32(torch.ones(2, 2).numpy().tobytes())
    with pytest.raises(KeyError):
        writer.checksum("s", 0, 1)
    writer.write("s", torch.tensor(5.0))
    sha256 = writer.sha256()
    writer.close()
    assert hashlib.sha256(writer.path.read_bytes()).hexdigest() == sha256


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_hashing_sees_a_header_that_has_changed(complete: SafetensorsWriter) -> None:
    flip(complete.path, 12)
    for _ in range(2):  # however often it is asked
        with pytest.raises(
            OutputError, match="found another header, expected the one that was written; check the disk"
        ):
            complete.sha256()


def test_hashing_sees_a_tensor_that_has_changed(complete: SafetensorsWriter) -> None:
    flip(complete.path, -5)  # before it the four bytes of "s", or the end of "w", whichever is last
    complete.sha256()
    found = [complete.checksum("w", 0, 2), complete.checksum("w", 2, 4), complete.checksum("s", 0, 1)]
    meant = [bytes(16), torch.ones(2, 2).numpy().tobytes(), torch.tensor(5.0).numpy().tobytes()]
    assert sum(checksum != zlib.crc32(data) for checksum, data in zip(found, meant, strict=True)) == 1


def test_hashing_sees_a_file_that_was_cut(complete: SafetensorsWriter) -> None:
    os.truncate(complete.path, complete.path.stat().st_size - 1)
    with pytest.raises(OutputError, match="found its end at byte"):
        complete.sha256()
