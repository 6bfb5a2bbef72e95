import math
import pickle
import random
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from omni_convert.formats.arithmetic.ggml.k_quants import K_QUANTS
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.gguf_file import PLAIN_DTYPES, GgufReader
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.schemes.gguf import is_dequantized
from omni_convert.formats.views.base import dequantized_view

Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
BLOCK_TYPES = [kind for kind, (block, _) in gguf.GGML_QUANT_SIZES.items() if block > 1 and is_dequantized(kind.name)]
U8, U32, I32, STRING, ARRAY, U64 = 0, 4, 5, 8, 9, 10


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def header(
    tensors: Sequence[bytes], pairs: Sequence[bytes] = (), version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    many = counts or (len(tensors), len(pairs))
    written = b"GGUF" + struct.pack("<IQQ", version, *many) + b"".join(pairs) + b"".join(tensors)
    return written + bytes(-len(written) % 32)


ONE = tensor("a.weight", (2, 32), Q8_0, 0)
DATA = bytes(96)
FLAT = tensor("a.weight", (8,), F32, 0)


def array(kind: int, count: int, rest: bytes = b"") -> bytes:
    return pair("k", ARRAY, struct.pack("<IQ", kind, count) + rest)


HOSTILE = {
    "empty": (b"", "expected a GGUF file"),
    "magic": (b"GGML" + bytes(60), "expected a GGUF file"),
    "lfs": (b"version https://git-lfs", "git lfs pull"),
    "no counts": (b"GGUF\x03\x00\x00\x00", "truncated"),
    "version 1": (header([ONE], version=1) + DATA, "found GGUF version 1"),
    "version 4": (header([ONE], version=4) + DATA, "found GGUF version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + DATA, "big-endian"),
    "huge count of tensors": (header([ONE], counts=(1 << 60, 0)) + DATA, "damaged|truncated|type|dimensions|twice"),
    "huge count of keys": (header([], counts=(1, 1 << 60)) + DATA, "twice"),
    "huge array": (header([ONE], [array(U8, 1 << 60)]) + DATA, "truncated"),
    "huge array of texts": (header([ONE], [array(STRING, 1 << 60)]) + DATA, "truncated"),
    "array of arrays": (header([ONE], [array(ARRAY, 1, array(U8, 0))]) + DATA, "array of arrays"),
    "array of type 99": (header([ONE], [array(99, 1)]) + DATA, "array of type 99"),
    "value of type 99": (header([ONE], [pair("k", 99, b"")]) + DATA, "value of type 99"),
    "long text": (header([ONE], [text(b"")[:0] + struct.pack("<Q", 1 << 62)]) + DATA, "truncated"),
    "key twice": (header([ONE], [pair("k", U32, bytes(4))] * 2) + DATA, "'k' twice"),
    "name twice": (header([FLAT, FLAT]) + DATA, "'a.weight' twice"),
    "name no UTF-8": (header([tensor(b"\xff\xfe", (8,), F32, 0)]) + DATA, "expected UTF-8"),
    "nine dimensions": (header([tensor("a", (1,) * 9, F32, 0)]) + DATA, "9 dimensions"),
    "unknown type": (header([tensor("a", (32,), 200, 0)]) + DATA, "type 200"),
    "removed type": (header([tensor("a", (32,), 4, 0)]) + DATA, "type 4"),
    "width": (header([tensor("a.weight", (2, 33), Q8_0, 0)]) + DATA, "expected a multiple of 32"),
    "scalar of blocks": (header([tensor("a.weight", (), Q8_0, 0)]) + DATA, "expected a multiple of 32"),
    "product wraps around": (header([tensor("a", (1 << 32, 1 << 32), F32, 0)]) + DATA, "truncated"),
    "truncated data": (header([ONE]) + DATA[:64], "truncated"),
    "out of the file": (header([tensor("a", (8,), F32, 1 << 40)]) + DATA, "truncated"),
    "offset wraps around": (header([tensor("a", (8,), F32, (1 << 64) - 32)]) + DATA, "truncated"),
    "overlap": (header([FLAT, tensor("b", (16,), F32, 0)]) + DATA, "overlap"),
    "unaligned": (header([tensor("a", (8,), F32, 4)]) + DATA, "multiple of 32"),
    "alignment 0": (header([FLAT], [pair("general.alignment", U32, bytes(4))]) + DATA, "power of two"),
    "alignment 24": (header([FLAT], [pair("general.alignment", U32, struct.pack("<I", 24))]) + DATA, "power of two"),
    "alignment a text": (header([FLAT], [pair("general.alignment", STRING, text("32"))]) + DATA, "power of two"),
    "other shape": (
        header([FLAT], [pair("comfy.gguf.orig_shape.a.weight", ARRAY, struct.pack("<IQii", I32, 2, 3, 3))]) + DATA,
        "expected a shape of 8 numbers",
    ),
    "negative shape": (
        header([FLAT], [pair("comfy.gguf.orig_shape.a.weight", ARRAY, struct.pack("<IQii", I32, 2, -2, -4))]) + DATA,
        "expected a shape of 8 numbers",
    ),
    "no tensors": (header([]), "found no tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_no_truncation_of_a_header_gets_through(tmp_path: Path) -> None:
    whole = header([ONE], [pair("general.architecture", STRING, text("flux")), array(U8, 3, b"abc")]) + DATA
    path = tmp_path / "model.gguf"
    for length in range(len(whole) - len(DATA) + 68):  # the tensor takes 68 bytes of the data
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GgufReader(path)
    path.write_bytes(whole[: length + 1])
    assert GgufReader(path).architecture == "flux"


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_and_other_alignments_are_read(version: int, tmp_path: Path) -> None:
    pairs = [pair("general.alignment", U32, struct.pack("<I", 64)), array(STRING, 2, text("x") + text("y"))]
    written = header([tensor("a", (8,), F32, 0), tensor("b", (2,), F32, 64)], pairs, version)
    numbers = np.arange(10, dtype=np.float32)
    path = tmp_path / "model.gguf"
    path.write_bytes(written + bytes(-len(written) % 64) + numbers[:8].tobytes() + bytes(32) + numbers[8:].tobytes())
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.read("a").tolist() == list(range(8))
        assert checkpoint.read("b").tolist() == [8, 9]


def written(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]) -> Path:
    """A file of the gguf package's own writer; tensors of blocks are given as their bytes."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_rows_of_every_type_are_what_the_gguf_package_makes_of_them(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(int(kind)).integers(0, 256, (5, 2 * size), dtype=np.uint8)
    data[:, 1::2] &= 0x3F  # numbers stay finite
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    path = written(tmp_path / "model.gguf", {"a.weight": (data, kind)})
    with open_quantized(path) as opened:
        assert opened.dialect == "gguf"
        layer = opened.layers["a"]
        assert (layer.format.label, layer.shape) == (f"gguf {kind.name}", (5, 2 * block))
        for start, stop in ((0, 5), (1, 3), (4, 5)):
            torch.testing.assert_close(
                layer.dequantize(start, stop), expected[start:stop], rtol=0, atol=0, equal_nan=True
            )


def refusal_of(path: Path) -> str:
    """Why the layers of a file cannot be read, or nothing if they can."""
    try:
        with open_quantized(path) as opened:
            for layer in opened.layers.values():
                assert layer.dequantize(0, layer.shape[0]).shape == layer.shape
                layer.format.flaw(layer.read(0, layer.shape[0]))
    except CheckpointError as error:
        return str(error)
    return ""


def test_changed_bytes_of_a_file_of_super_blocks_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.gguf", {}
    for name, block in K_QUANTS.items():
        data = np.ones((3, 512 // block.numbers * block.size), np.uint8)
        tensors[f"{name}.weight"] = (data, gguf.GGMLQuantizationType[name])
    whole = written(path, tensors).read_bytes()
    draw, outcomes = random.Random(0), Counter[str]()
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(700)] = draw.choice((0, 1, 2, 32, 127, 128, 255, draw.randrange(256)))
        path.write_bytes(changed[: draw.choice((len(whole), len(whole), draw.randrange(len(whole))))])
        outcomes[refusal_of(path)] += 1
    assert all(len(message.splitlines()) <= 1 for message in outcomes)
    assert outcomes[""] > 60  # were read
    assert len(outcomes) > 60


@pytest.mark.parametrize("name", PLAIN_DTYPES)
def test_plain_types_are_tensors_of_torch(name: str, tmp_path: Path) -> None:
    numbers = torch.arange(24).view(2, 3, 4).to(PLAIN_DTYPES[name])
    data = numbers.view(torch.uint8).numpy() if name == "BF16" else numbers.numpy()
    path = written(tmp_path / "model.gguf", {"a.weight": (data, gguf.GGMLQuantizationType[name])})
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint["a.weight"].dtype is PLAIN_DTYPES[name]
        assert checkpoint.read("a.weight").equal(numbers)
        assert checkpoint.read_rows("a.weight", 1, 2).equal(numbers[1:2])


@pytest.mark.parametrize("shape", [(4, 16, 2, 2, 2), (32, 4, 2, 2), (64, 5, 4)])
def test_blocks_of_a_weight_that_was_reshaped_give_the_weight(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal(math.prod(shape), dtype=np.float32)
    data = gguf.quants.quantize(weight.reshape(-1, 256 if len(shape) < 5 else 64), Q8_0)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "sd1")
    writer.add_tensor("a.weight", data, raw_dtype=Q8_0)
    writer.add_array("comfy.gguf.orig_shape.a.weight", list(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(gguf.quants.dequantize(data, Q8_0)).view(shape)
    with open_quantized(path) as opened:
        view = dequantized_view(opened)
        assert view["a.weight"].shape == shape
        assert view.read("a.weight").equal(expected)
        assert view.read_rows("a.weight", 1, 3).equal(expected[1:3])


def test_another_process_opens_the_same_file_and_no_other(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", {"a": (np.zeros(8, np.float32), F32)})
    pickled = pickle.dumps(GgufReader(path))
    assert pickle.loads(pickled).read("a").tolist() == [0] * 8
    written(path, {"b": (np.zeros(8, np.float32), F32)})
    with pytest.raises(CheckpointError, match="found another file"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("a.weight", "Q8_K", "found type Q8_K"), ("a.scale", "Q8_0", "blocks in a tensor called NAME.weight")],
)
def test_layers_that_nobody_can_read_are_named(name: str, kind: str, message: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    path = tmp_path / "model.gguf"
    path.write_bytes(header([tensor(name, (block,), number, 0)]) + bytes(size))
    with pytest.raises(CheckpointError, match=message):
        open_quantized(path)


def test_a_folder_has_one_file(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        written(tmp_path / name, {"a": (np.zeros(8, np.float32), F32)})
    with pytest.raises(CheckpointError, match=r"found 2 \.gguf files"):
        Checkpoint.open(tmp_path)
    (tmp_path / "two.gguf").unlink()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint) == ["a"]
