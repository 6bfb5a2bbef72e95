"""Hostile checkpoints: whatever its files hold, a folder is read for what it says or refused in one line, cheaply.

Each case is a small valid checkpoint in which a few things were changed: values, keys and names in the JSON of a
header, an index or a config; bytes of any file; which files there are. Then `convert` and the loaders read it.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from omni_convert.convert.plan.plan import plan_conversion
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import Source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.config import ACTIVATION_SCHEMES, QuantizationConfig
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TORCH_DTYPES
from omni_convert.formats.dialects import auto_round, omni_convert, vllm_omni
from omni_convert.formats.dialects.auto_round import AUTO_ROUND
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.bitsandbytes import BITSANDBYTES
from omni_convert.formats.dialects.comfyui import COMFYUI
from omni_convert.formats.dialects.config_block import read_block
from omni_convert.formats.dialects.nunchaku import NUNCHAKU
from omni_convert.formats.dialects.nunchaku_lite import NUNCHAKU_LITE
from omni_convert.formats.dialects.svdquant import SVDQUANT
from omni_convert.formats.errors import CheckpointError, OmniConvertError
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.schemes.convrot_w4a4 import ConvrotW4A4
from omni_convert.formats.schemes.int8 import RotatedInt8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.schemes.rotated_grid import W4a8, W6a8
from omni_convert.formats.schemes.svdquant import TILE, SvdQuantInt4, SvdQuantNvfp4
from omni_convert.formats.table import LOADABLE
from omni_convert.loaders.loading.install import install_empty_layers
from omni_convert.loaders.loading.pipeline_files import open_weights
from omni_convert.loaders.loading.select import declared_format, stored_layers

CASES = 5_000
SLOW_ROUNDS = 40  # of as many cases: 200,000
LONGEST_CASE = 2.0  # seconds of computing, all of it in the thread that reads
# Address space that all cases of a round together may add; a file here has a few hundred bytes.
MEMORY = 256 << 20
LONGEST_MESSAGE = 1_000

CLASS = "ZImageTransformer2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = f"{WEIGHTS}.index.json"
STEMS = [f"layers.0.attention.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
QUANTIZED = STEMS[-2:]
WIDTH = 64
PACKED = QuantizationConfig("w4a16", "none", group_size=32)

Files = dict[str, bytes]


def pipeline(weights: Files, block: Mapping[str, Any] | None = None) -> Files:
    config = {"_class_name": CLASS, "dim": WIDTH} | ({"quantization_config": block} if block else {})
    files = {"config.json": json.dumps(config).encode()} | weights
    index = {"_class_name": "ZImagePipeline", "transformer": ["diffusers", CLASS], "vae": [None, None]}
    return {"model_index.json": json.dumps(index).encode()} | {f"transformer/{n}": files[n] for n in files}


def plain_pipeline() -> Files:
    halves = [
        {f"{stem}.weight": torch.zeros(2, WIDTH, dtype=torch.bfloat16) for stem in stems}
        for stems in (STEMS[:1], [*STEMS[1:], "cap_embedder.1"])
    ]
    weights = {shard: save(half) for shard, half in zip(SHARDS, halves, strict=True)}
    weight_map = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    return pipeline(weights | {INDEX: json.dumps(index).encode()})


def quantized_pipeline(config: QuantizationConfig, to_block: Callable[..., dict[str, Any]]) -> Files:
    layouts = declared_format(config).layout(2, WIDTH)
    tensors = {
        f"{stem}.{suffix}": torch.zeros(layout.shape, dtype=layout.dtype)
        for stem in QUANTIZED
        for suffix, layout in layouts.items()
    }
    return pipeline({WEIGHTS: save(tensors)}, to_block(config))


def marked_pipeline() -> Files:
    """The model as ComfyUI spells it: marks beside the weights, and in the header."""
    mark = {"format": "float8_e4m3fn"}
    layer = {
        "weight": torch.zeros(2, WIDTH, dtype=torch.float8_e4m3fn),
        "weight_scale": torch.ones(()),
        "comfy_quant": torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8),
    }
    tensors = {f"{stem}.{suffix}": tensor.clone() for stem in QUANTIZED for suffix, tensor in layer.items()}
    marks = json.dumps({"format_version": "1.0", "layers": dict.fromkeys(QUANTIZED, mark)})
    return pipeline({WEIGHTS: save(tensors, {"_quantization_metadata": marks})})


def spelled_pipeline(dialect: Dialect, fmt: QuantizingFormat, kept: Collection[str]) -> Files:
    """The model in a format that only some dialects hold."""
    shape = (2, WIDTH) if fmt.unsupported(2, WIDTH) is None else (TILE, TILE)
    layouts, spelling = fmt.layout(*shape), dialect.spelling(fmt, shape)
    assert not isinstance(spelling, str), spelling
    layer = spelling.encode(
        {suffix: torch.ones(layout.shape, dtype=layout.dtype) for suffix, layout in layouts.items()}
    )
    tensors = {f"{stem}.{suffix}": tensor.clone() for stem in QUANTIZED for suffix, tensor in layer.items()}
    formats = dict.fromkeys(QUANTIZED, fmt)
    return pipeline({WEIGHTS: save(tensors, dialect.metadata(formats))}, dialect.block(formats, kept))


#: Name to the dialect and the format of a pipeline that no library reads, or under names of its own.
SPELLED: dict[str, tuple[Dialect, QuantizingFormat]] = {
    "rotated int8": (COMFYUI, RotatedInt8(64)),
    "convrot_w4a4": (COMFYUI, ConvrotW4A4(64)),
    "w4a8": (COMFYUI, W4a8(64)),
    "w6a8": (COMFYUI, W6a8(64)),
    "auto-round mxfp8": (AUTO_ROUND, Mxfp8()),
    "auto-round mxfp4": (AUTO_ROUND, Mxfp4()),
    "auto-round nvfp4": (AUTO_ROUND, Nvfp4(static=True)),
    "nf4": (BITSANDBYTES, Nf4()),
    "nf4 nested": (BITSANDBYTES, Nf4(nested=True)),
    "nunchaku int4": (NUNCHAKU, SvdQuantInt4(16)),
    "nunchaku nvfp4": (NUNCHAKU, SvdQuantNvfp4(16)),
    "nunchaku-lite int4": (NUNCHAKU_LITE, SvdQuantInt4(16)),
    "nunchaku-lite nvfp4": (NUNCHAKU_LITE, SvdQuantNvfp4(16)),
    "vllm-omni-svdquant": (SVDQUANT, SvdQuantNvfp4(16)),
}


def valid_pipelines() -> dict[str, Files]:
    kept = ("cap_embedder.1",)
    configs = {
        method: QuantizationConfig(method, schemes[-1], ignored_layers=kept)
        for method, schemes in ACTIVATION_SCHEMES.items()
        if method in LOADABLE and method != PACKED.method
    } | {"fp8 blocks": QuantizationConfig("fp8", weight_block_size=(32, 32), ignored_layers=kept)}
    written = {name: quantized_pipeline(config, vllm_omni.to_block) for name, config in configs.items()}
    ours = quantized_pipeline(configs["int8"], omni_convert.to_block)
    packed = quantized_pipeline(PACKED, lambda config: auto_round.to_block(config.group_size, QUANTIZED, kept))
    others = {"plain": plain_pipeline(), "comfyui": marked_pipeline(), "ours": ours, PACKED.method: packed}
    spelled = {
        name: spelled_pipeline(dialect, fmt, () if dialect is NUNCHAKU else kept)
        for name, (dialect, fmt) in SPELLED.items()
    }
    return others | written | spelled


VALID = valid_pipelines()

SAME_KEY = "\0"  # a key that ends in it is written without: the second of its name
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 31, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, 10**30, -0.0, 0.5, float("nan")),
    *("", "a", "..", "../x.safetensors", "/etc/passwd", "a\nb", "\0", "\ud800", "é", "x" * 5000, "%s{}", "NaN"),
    *([], {}, [[]], [None], {"a": {}}, [0], [1, -1], [2**62, 2**62], [0, 2**64], [1] * 100, [2, WIDTH], [[2], [2]]),
    *("U8", "I8", "F32", "F64", "BF16", "F8_E4M3", "F8_E8M0", "C64", "BOOL", "F4", "float32"),
    *("fp8", "int8", "mxfp4", "nvfp4", "modelopt", "FP8", "NVFP4", "omni_convert", "static", "dynamic", "none", "gguf"),
    *("quant_method", "method", "quant_algo", "ignored_layers", "weight_block_size", "quantization_config"),
    *("architectures", "_class_name", "text_encoder", "transformer", "transformer_2", "__metadata__", "weight_map"),
    *("WanTransformer3DModel", "FluxTransformer2DModel", CLASS, "T5EncoderModel", "Unknown"),
    *("weight", "layers.0.attention.to_q.weight", "layers.0.attention.to_qkv.weight", "layers.1.mlp.0.weight"),
    *(f"layers.0.attention.to_q.{suffix}" for suffix in ("weight_scale", "weight_scale_inv", "weight_scale_2")),
    *("layers.0.attention.to_q.mul_scale", "layers.0.attention.to_q.input_scale", WEIGHTS, INDEX, *SHARDS),
    *("config.json", "model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.bin"),
]


@dataclass(frozen=True)
class Change:
    """Something done to a file; places are taken modulo what there is."""

    file: int
    kind: str
    place: int
    value: Any


SHAPES = [[], [0], [1], [2], [WIDTH], [1, 1], [2, WIDTH], [WIDTH, 2], [0, WIDTH], [2, 0], [2, WIDTH, 1], [2, 1, 1]]

JSON_KINDS = ("set", "set", "set", "remove", "add", "rename", "repeat", "wrap", "refit", "refit")
BYTE_KINDS = ("flip", "cut", "insert", "delete")
FILE_KINDS = ("drop", "move", "empty")
places = st.integers(0, 1 << 16)
changes = st.lists(
    st.builds(
        Change,
        file=st.integers(0, 4),
        kind=st.sampled_from(JSON_KINDS * 3 + BYTE_KINDS + FILE_KINDS),
        place=places,
        value=st.sampled_from(VALUES) | st.integers() | st.text(st.characters(exclude_categories=()), max_size=4),
    ),
    min_size=1,
    max_size=3,
)


def changed(valid: Files, wanted: list[Change]) -> Files:
    files = dict(valid)
    for change in wanted:
        name = list(files)[change.file % len(files)]
        if change.kind in FILE_KINDS:
            content = files.pop(name)
            if change.kind == "move" and isinstance(change.value, str) and is_file_name(change.value):
                files[f"transformer/{change.value}"] = content
            elif change.kind == "empty" or not files:
                files[name] = b""
        elif change.kind in BYTE_KINDS:
            files[name] = change_bytes(files[name], change)
        else:
            files[name] = change_json(files[name], change)
    return files


def is_file_name(name: str) -> bool:
    is_plain = name.isascii() and name.isprintable() and not set(name) & set("/\\")
    return is_plain and name not in ("", ".", "..") and len(name) < 100


def change_bytes(content: bytes, change: Change) -> bytes:
    place = change.place % (len(content) + 1)
    inserted = str(change.value).encode("utf-8", "surrogatepass")[:100]
    if change.kind == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ 1 << change.place % 8]) + content[place + 1 :]
    if change.kind == "insert":
        return content[:place] + inserted + content[place:]
    return content[:place] if change.kind == "cut" else content[:place] + content[place + 1 + change.place % 9 :]


def change_json(content: bytes, change: Change) -> bytes:
    """JSON, or a safetensors file around it, in which one node is another; as it was if it is damaged already."""
    is_weights = not content.startswith(b"{")
    size = int.from_bytes(content[:8], "little") if is_weights else len(content)
    text, rest = (content[8 : 8 + size], content[8 + size :]) if is_weights else (content, b"")
    try:
        tree = json.loads(text)
    except ValueError:
        return content
    if is_weights and change.kind == "refit" and isinstance(tree, dict):
        return refitted(tree, change)
    nodes = list(holders(tree))
    if not nodes:
        return content
    change_node(*nodes[change.place % len(nodes)], change)
    text = json.dumps(tree).replace("\\u0000", "").encode()
    return (len(text).to_bytes(8, "little") if is_weights else b"") + text + rest


def refitted(header: dict[str, Any], change: Change) -> bytes:
    """A sound file of the same tensors, one of which has another name, dtype or shape, or is missing."""
    tensors = dict(layouts_in(header))
    name = sorted(tensors)[change.place % len(tensors)] if tensors else "weight"
    dtype, shape = tensors.pop(name, (torch.uint8, [1]))
    if change.value in DTYPE_NAMES.values():
        dtype = TORCH_DTYPES[change.value]
    elif isinstance(change.value, str):
        name = change.value if change.value.isascii() else name
    elif change.value is not None:
        shape = SHAPES[change.place // 8 % len(SHAPES)]
    if change.value is not None:
        tensors[name] = (dtype, shape)
    return save({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()})


def layouts_in(header: dict[str, Any]) -> Iterator[tuple[str, tuple[torch.dtype, list[int]]]]:
    """The tensors of a header that are still sound, and small."""
    for name, entry in header.items():
        if isinstance(entry, dict) and entry.get("dtype") in list(TORCH_DTYPES) and is_small(entry.get("shape")):
            yield name, (TORCH_DTYPES[entry["dtype"]], entry["shape"])


def is_small(shape: Any) -> bool:
    return (
        isinstance(shape, list) and len(shape) < 4 and all(type(size) is int and 0 <= size <= WIDTH for size in shape)
    )


def holders(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object below a node, with each index or key."""
    for key in list(tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()):
        yield tree, key
        yield from holders(tree[key])


def change_node(holder: Any, key: Any, change: Change) -> None:
    if change.kind in ("set", "refit") or (isinstance(holder, list) and change.kind in ("add", "rename", "repeat")):
        holder[key] = change.value
    elif change.kind == "remove":
        del holder[key]
    elif change.kind == "wrap":
        holder[key] = [holder[key]] if change.place % 2 else {"a": holder[key]}
    elif change.kind == "add":
        holder[str(change.value)] = holder[key]
    elif change.kind == "rename":
        holder[str(change.value)] = holder.pop(key)
    else:
        holder[key + SAME_KEY] = change.value


@dataclass
class Place:
    """Where cases lie: a folder in memory that is written only where a case differs from the one before."""

    folder: Path
    written: Files = field(default_factory=dict)

    def put(self, files: Files) -> Path:
        for name in self.written.keys() - files.keys():
            (self.folder / name).unlink()
        for name, content in files.items():
            if self.written.get(name) != content:
                (self.folder / name).write_bytes(content)
        self.written = files
        return self.folder


def plan(folder: Path) -> None:
    """Reads it as `convert` does, up to the point where tensors are read."""
    plan_conversion(Source(folder, "hostile"), Recipe())


def read_tensors(folder: Path) -> None:
    """Reads every byte of every tensor."""
    with Checkpoint.open(folder / "transformer") as checkpoint:
        checkpoint.fingerprint()
        sizes = {name: checkpoint.read(name).nbytes for name in checkpoint}
    assert sizes == {name: spec.nbytes for name, spec in checkpoint.items()}


def decode(folder: Path) -> None:
    """Reads it as a checkpoint of any dialect."""
    with open_quantized(folder / "transformer") as quantized:
        for layer in quantized.layers.values():
            assert layer.dequantize(0, layer.shape[0]).shape == layer.shape


def install(folder: Path) -> None:
    """Reads it as the loaders do once a library has found the files and the block."""
    component = folder / "transformer"
    block = read_json(component / "config.json").get("quantization_config")
    config = read_block(block) if block is not None else QuantizationConfig("mxfp4")
    with open_weights(sorted(component.glob("*.safetensors"))) as specs:
        install_empty_layers(model(), specs, stored_layers(specs, config, str(component)), str(component))


def model() -> nn.Module:
    attention = nn.Module()
    for name in ("to_q", "to_k", "to_v"):
        attention.add_module(name, nn.Linear(WIDTH, 2, bias=False, device="meta"))
    attention.add_module("to_out", nn.ModuleList([nn.Linear(WIDTH, 2, bias=False, device="meta")]))
    layer, root = nn.Module(), nn.Module()
    layer.add_module("attention", attention)
    root.add_module("layers", nn.ModuleList([layer]))
    return root


READERS: dict[Callable[[Path], None], type[OmniConvertError]] = {
    plan: OmniConvertError,  # the recipe may also not suit what the files say
    read_tensors: CheckpointError,
    install: OmniConvertError,
    decode: CheckpointError,
}


def is_read(read: Callable[[Path], None], folder: Path) -> bool:
    try:
        read(folder)
    except READERS[read] as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert len(message) < LONGEST_MESSAGE, message
        return False
    return True


@contextmanager
def limited_memory() -> Iterator[None]:
    """More than `MEMORY` raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What torch computes is the reading thread's own time, which a busy machine does not prolong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place() -> Iterator[Place]:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    (folder / "transformer").mkdir()
    yield Place(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("valid", VALID)
def test_what_the_cases_are_made_of_is_valid(place: Place, valid: str) -> None:
    folder = place.put(VALID[valid])
    read_tensors(folder)
    decode(folder)
    if valid == "plain":
        plan(folder)
    elif valid not in ("comfyui", *SPELLED):
        install(folder)


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, SLOW_ROUNDS))])
def test_any_checkpoint_is_read_or_refused_in_one_line(place: Place, number: int) -> None:
    outcomes: Counter[tuple[str, bool]] = Counter()

    @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(valid=st.sampled_from(["plain"] * len(VALID) + sorted(VALID)), wanted=changes)
    def read(valid: str, wanted: list[Change]) -> None:
        folder = place.put(changed(VALID[valid], wanted))
        for reader in READERS:
            began = time.thread_time()
            outcomes[reader.__name__, is_read(reader, folder)] += 1
            assert time.thread_time() < began + LONGEST_CASE

    with limited_memory():
        read()
    for reader in READERS:  # cases that all fail at the door would test nothing behind it
        assert min(outcomes[reader.__name__, True], outcomes[reader.__name__, False]) > CASES // 50, outcomes
