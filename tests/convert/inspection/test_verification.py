"""`verify` finds what is wrong with a file, and nothing in files that are right: a corpus of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.plan.plan import plan_conversion
from omni_convert.convert.source.location import Source
from omni_convert.formats.arithmetic.e2m1 import encode_e2m1, pack_nibbles
from omni_convert.formats.arithmetic.swizzle import swizzle_scales, unswizzle_scales
from omni_convert.formats.checks.meaning import doubts
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.codec import Reciprocal
from omni_convert.formats.dialects.found import describe
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.dialects.vllm_omni import ignored_names
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.families.table import find_family
from omni_convert.formats.finding import CHECKS, Finding
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorRows
from omni_convert.formats.schemes.convrot_w4a4 import ConvrotW4A4
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.formats.schemes.int8 import Int8, RotatedInt8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.schemes.rotated_grid import W4a8, W6a8
from omni_convert.formats.views.opened import read_layers
from omni_convert.loaders.loading.refusal import refuse_undeclared

CLASS = "ZImageTransformer2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Q, K, V, OUT = (f"layers.0.attention.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0"))
W1, W2, W3 = (f"layers.0.feed_forward.{leaf}" for leaf in ("w1", "w2", "w3"))
GROUPS = ((Q, K, V), (OUT,), (W1, W3), (W2,))
KEPT = tuple(name.replace("layers.0", "layers.1") for name in (Q, K, V, OUT, W1, W2, W3))
OUTSIDE = "cap_embedder.1"

FORMATS: dict[str, Format] = {
    "fp8": Fp8(),
    "fp8 static": Fp8(static=True),
    "fp8 blocks": Fp8Block((64, 64)),
    "int8": Int8(shared_in_group=True),
    "int8 rotated": RotatedInt8(256),
    "convrot_w4a4": ConvrotW4A4(256),
    "grid w4a8": W4a8(256),
    "grid w6a8": W6a8(256),
    "mxfp8": Mxfp8(search=False),
    "mxfp8 searched": Mxfp8(),
    "mxfp4": Mxfp4(search=False),
    "mxfp4 smooth": Mxfp4(search=False, smooth=True),
    "mxfp4_dualscale": Mxfp4DualScale(),
    "nvfp4": Nvfp4(search=False),
    "nvfp4 static": Nvfp4(static=True, search=False),
    "w4a16": Int4(64),
    "nf4": Nf4(),
    "nf4 nested": Nf4(nested=True),
}


@dataclass
class Model:
    """The files of a component, before they are written."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=lambda: {"_class_name": CLASS})
    metadata: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] | None = None
    sidecar: dict[str, Any] | None = None

    @property
    def block(self) -> dict[str, Any]:
        block: dict[str, Any] = self.config["quantization_config"]
        return block

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **self.metadata})
        if self.config:
            (folder / "config.json").write_text(json.dumps(self.config))
        if self.sidecar is not None:
            (folder / "hf_quant_config.json").write_text(json.dumps(self.sidecar))
        if self.labels is not None:
            (folder / "quant_model_description.json").write_text(json.dumps(self.labels))
        return folder


def shape_of(stem: str, hidden: int) -> tuple[int, int]:
    leaf = stem.rpartition(".")[2]
    return {"w1": (2 * hidden, hidden), "w3": (2 * hidden, hidden), "w2": (hidden, 2 * hidden)}.get(
        leaf, (hidden, hidden)
    )


def originals(hidden: int = 256) -> dict[str, Tensor]:
    """Weights of a small Z-Image, independent Gaussian numbers: no structure that would help."""
    generator = torch.Generator().manual_seed(0)
    stems = [stem for group in GROUPS for stem in group] + list(KEPT)
    weights = {
        f"{stem}.weight": (torch.randn(shape_of(stem, hidden), generator=generator) * 0.03).to(torch.bfloat16)
        for stem in stems
    }
    weights[f"{OUTSIDE}.weight"] = (torch.randn(hidden, 64, generator=generator) * 0.03).to(torch.bfloat16)
    weights["layers.0.attention_norm1.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return weights


def quantized_layers(fmt: Format, hidden: int) -> dict[str, dict[str, Tensor]]:
    """Stem to canonical tensors; groups share what the runtime merges."""
    weights = originals(hidden)
    static = bool(getattr(fmt, "static", False))
    base = replace(fmt, static=False) if static else fmt  # type: ignore[type-var]  # a dataclass, as static shows
    layers: dict[str, dict[str, Tensor]] = {}
    for group in GROUPS:
        rows = [TensorRows(weights[f"{stem}.weight"]) for stem in group]
        fitted = base.fit(rows, None)
        for stem, each in zip(group, rows, strict=True):
            layers[stem] = base.quantize_rows(each.weight, fitted) | base.constants(fitted)
            if static:
                layers[stem]["input_scale"] = torch.tensor(0.0078125)
    return layers


def unquantized(hidden: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in originals(hidden).items() if name.removesuffix(".weight") not in LAYERS}


LAYERS = tuple(stem for group in GROUPS for stem in group)


def written(dialect: str, method: str, hidden: int = 256) -> Model:
    """The model as our own writer spells it."""
    fmt, rest = FORMATS[method], unquantized(hidden)
    tensors: dict[str, Tensor] = {}
    for stem, canonical in quantized_layers(fmt, hidden).items():
        spelling = DIALECTS[dialect].spelling(fmt, shape_of(stem, hidden))
        assert not isinstance(spelling, str), spelling
        tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in spelling.encode(canonical).items()}
    specs = {name: TensorSpec(name, each.dtype, tuple(each.shape)) for name, each in originals(hidden).items()}
    groups = find_family(CLASS).layer_groups(specs, "vllm-omni")
    ignored = ignored_names(group for group in groups if group.members[0] in KEPT)
    if dialect == "bitsandbytes":  # whose readers quantize every linear that is not named
        ignored = [*KEPT, OUTSIDE]
    formats = dict.fromkeys(LAYERS, fmt)
    block = DIALECTS[dialect].block(formats, ignored)
    config = {"_class_name": CLASS, **({"quantization_config": block} if block is not None else {})}
    return Model(tensors | rest, config, DIALECTS[dialect].metadata(formats))


def renamed(method: str, names: dict[str, str], hidden: int = 256, **codecs: Callable[[Tensor], Tensor]) -> Model:
    """Canonical tensors under other names, each through a function where one is given; no config."""
    tensors = {
        f"{stem}.{names.get(suffix, suffix)}": codecs.get(suffix, lambda same: same)(tensor)
        for stem, canonical in quantized_layers(FORMATS[method], hidden).items()
        for suffix, tensor in canonical.items()
    }
    return Model(tensors | unquantized(hidden), {})


def packed(values: Tensor) -> Tensor:
    return pack_nibbles(encode_e2m1(values.float()))


def reciprocal(number: Tensor) -> Tensor:
    return Reciprocal().encode(number)


def as_e8m0(scales: Tensor) -> Tensor:
    return swizzle_scales(scales).view(torch.float8_e8m0fnu)


def column(scales: Tensor) -> Tensor:
    return scales.reshape(1, 1)


def lightx2v(method: str) -> Model:
    if method == "nvfp4":
        names = {"weight_scale_2": "weight_global_scale"}
        return renamed(method, names, weight_scale=swizzle_scales, weight_scale_2=reciprocal)
    codes = {"weight": packed} if method == "mxfp4" else {}
    return renamed(method, {}, weight_scale=as_e8m0, **codes)


def bfl(method: str) -> Model:
    if method == "fp8 rows":
        model = renamed("int8", {})
        for stem in LAYERS:
            scale = model.tensors[f"{stem}.weight_scale"] * 127 / 448
            codes = originals()[f"{stem}.weight"].float() / scale
            model.tensors[f"{stem}.weight"] = codes.clamp(-448, 448).to(torch.float8_e4m3fn)
            model.tensors[f"{stem}.weight_scale"] = scale.flatten()
        return model
    return renamed(method, {})


LABELS = {
    "int8": "W8A8_DYNAMIC",
    "mxfp8": "W8A8_MXFP8",
    "mxfp4": "W4A4_MXFP4",
    "mxfp4_dualscale": "W4A4_MXFP4_DUALSCALE",
    "fp8 rows": "WFP8AFP8_DYNAMIC",
}


def msmodelslim(method: str) -> Model:
    model = bfl("fp8 rows") if method == "fp8 rows" else renamed(
        method, {}, **({"weight": packed} if "mxfp4" in method else {})
    )  # fmt: skip
    for stem in LAYERS:
        model.tensors.pop(f"{stem}.mul_scale", None)
        if method == "int8":
            model.tensors[f"{stem}.weight_offset"] = torch.zeros(len(model.tensors[f"{stem}.weight"]), 1)
    layers = {name for name in model.tensors if name.rpartition(".")[0] in LAYERS}
    model.labels = {name: LABELS[method] if name in layers else "FLOAT" for name in model.tensors}
    return model


def auto_round(method: str, group: int = 64) -> Model:
    if method == "mxfp4":
        model = renamed(method, {"weight": "weight_packed"}, weight=packed)
    elif method == "mxfp8":
        model = renamed(method, {})
    else:
        model = Model(unquantized(256), {})
        for stem in LAYERS:
            weight = originals()[f"{stem}.weight"].float()
            model.tensors |= {f"{stem}.{leaf}": tensor for leaf, tensor in gptq(weight, group).items()}
    block = {"bits": 4, "group_size": group, "packing_format": "auto_round:auto_gptq"} if method == "int4" else {}
    block |= {"quant_method": "auto-round", "block_name_to_quantize": "layers.0"}
    model.config = {"_class_name": CLASS, "quantization_config": block}
    return model


def gptq(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Four bits around a zero point of 8, words of eight codes along the columns."""
    rows, columns = weight.shape
    blocks = weight.view(rows, -1, group)
    scale = blocks.abs().amax(-1) / 7
    codes = ((blocks / scale[..., None]).round() + 8).view(rows, columns).to(torch.int64)
    shifts = torch.arange(0, 32, 4)
    words = (codes.T.reshape(-1, 8, rows) << shifts[:, None]).sum(1).to(torch.uint32).view(torch.int32)
    zeros = torch.full((columns // group, rows // 8), 0x77777777, dtype=torch.int32)
    return {"qweight": words, "scales": scale.T.to(torch.float16), "qzeros": zeros}


def transformers(scale_dtype: torch.dtype = torch.float32, hidden: int = 256) -> Model:
    model = renamed("fp8 blocks", {}, hidden, weight_scale_inv=lambda scale: scale.to(scale_dtype))
    kept = [
        name.removesuffix(".weight")
        for name, tensor in model.tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.element_size() > 1
    ]
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}
    block["modules_to_not_convert"] = kept
    model.config = {"architectures": ["Qwen3ForCausalLM"], "quantization_config": block}
    return model


def legacy(dtype: torch.dtype) -> Model:
    """ComfyUI's files of the first kind."""
    model = renamed("fp8", {"weight_scale": "scale_weight"}, weight=lambda codes: codes.float().to(dtype))
    model.tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return model


def prefixed(model: Model, prefix: str = "model.diffusion_model.") -> Model:
    marks = {name: tensor for name, tensor in model.tensors.items() if name == "scaled_fp8"}
    others = {f"{prefix}{name}": tensor for name, tensor in model.tensors.items() if name not in marks}
    return replace(model, tensors=others | marks)


def rotated() -> Model:
    model = written("comfyui", "int8")
    text = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256})
    for stem in LAYERS:
        model.tensors[f"{stem}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return replace(model, metadata={})


def marked_in_header() -> Model:
    model = written("comfyui", "nvfp4")
    return replace(model, tensors={name: each for name, each in model.tensors.items() if "comfy_quant" not in name})


def older_modelopt() -> Model:
    model = written("modelopt", "nvfp4 static")
    inner = {"quant_algo": "NVFP4", "exclude_modules": model.block["ignore"]}
    shape = {"quantization": inner, "producer": {"name": "modelopt"}}
    return replace(model, config={"_class_name": CLASS, "quantization_config": shape})


def packed_integers() -> Model:
    """compressed-tensors' pack-quantized: four bits, groups of 64, no zero points."""
    model = Model(unquantized(256))
    for stem in LAYERS:
        made = gptq(originals()[f"{stem}.weight"].float(), 64)
        codes = (made["qweight"].T[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        words = (codes.to(torch.int64) << torch.arange(0, 32, 4)).sum(-1).to(torch.uint32).view(torch.int32)
        size = torch.tensor(originals()[f"{stem}.weight"].shape)
        parts = {"weight_packed": words, "weight_scale": made["scales"].T.float(), "weight_shape": size}
        model.tensors |= {f"{stem}.{leaf}": tensor for leaf, tensor in parts.items()}
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}, "ignore": []}
    model.config["quantization_config"] = block
    return model


WRITTEN = [
    *(
        ("vllm-omni", method)
        for method in FORMATS
        if method[:5] not in ("nvfp4", "w4a16") and not any(word in method for word in ("rot", "grid", "nf4"))
    ),
    *(("auto-round", method) for method in ("w4a16", "mxfp8", "mxfp4", "nvfp4 static")),
    ("transformers", "fp8 blocks"),
    ("transformers", "mxfp8"),
    *(("modelopt", method) for method in ("fp8", "fp8 static", "mxfp8", "nvfp4", "nvfp4 static")),
    *(("comfyui", method) for method in ("fp8", "fp8 static", "int8", "int8 rotated", "mxfp8", "nvfp4")),
    *(("comfyui", method) for method in ("nvfp4 static", "convrot_w4a4", "grid w4a8", "grid w6a8")),
    *(("bitsandbytes", method) for method in ("nf4", "nf4 nested")),
    *(
        ("compressed-tensors", method)
        for method in ("fp8", "fp8 static", "fp8 blocks", "int8", "mxfp8", "mxfp4", "nvfp4", "nvfp4 static")
    ),
]
GOOD: dict[str, Callable[[], Model]] = {
    **{f"{dialect} {method}": (lambda d=dialect, m=method: written(d, m)) for dialect, method in WRITTEN},
    **{f"lightx2v {method}": (lambda m=method: lightx2v(m)) for method in ("mxfp8", "mxfp4", "nvfp4")},
    **{f"bfl {method}": (lambda m=method: bfl(m)) for method in ("fp8 rows", "nvfp4", "nvfp4 static", "int8")},
    **{f"msmodelslim {method}": (lambda m=method: msmodelslim(m)) for method in LABELS},
    **{f"auto-round {method}": (lambda m=method: auto_round(m)) for method in ("int4", "mxfp4", "mxfp8")},
    "transformers": transformers,
    "legacy e4m3": lambda: legacy(torch.float8_e4m3fn),
    "legacy e5m2": lambda: legacy(torch.float8_e5m2),
    "legacy with a prefix": lambda: prefixed(legacy(torch.float8_e4m3fn)),
    "rotated": rotated,
    "marked in the header": marked_in_header,
    "older modelopt": older_modelopt,
    "packed integers": packed_integers,
    "odd widths": lambda: written("modelopt", "nvfp4", hidden=208),
    "odd widths, swizzled": lambda: written("comfyui", "mxfp8", hidden=96),
    "not quantized": lambda: Model(originals()),
    "cast to E4M3": lambda: cast(torch.float8_e4m3fn),
    "cast to E5M2": lambda: cast(torch.float8_e5m2),
    "vectors cast, too": lambda: cast(torch.float8_e4m3fn, least=1),
    "one layer cast": lambda: cast(torch.float8_e4m3fn, of=(f"{Q}.weight",)),
    "cast beside marked layers": lambda: cast_beside_marks(),
}  # fmt: skip


def cast(dtype: torch.dtype, least: int = 2, of: Collection[str] = ()) -> Model:
    """Weights cast to FP8, which are the numbers that they are."""
    return Model({
        name: tensor.to(dtype) if tensor.dim() >= least and (name in of or not of) else tensor
        for name, tensor in originals().items()
    })  # fmt: skip


def cast_beside_marks() -> Model:
    model, names = written("comfyui", "fp8"), {f"{stem}.weight" for stem in KEPT}
    kept = {name: tensor.to(torch.float8_e5m2) for name, tensor in originals().items() if name in names}
    return replace(model, tensors=model.tensors | kept)


def findings_of(folder: Path, reference: Path | None = None) -> tuple[Finding, ...]:
    against = None if reference is None else Source(reference, "reference")
    (component,) = verify_source(Source(folder, "model"), against)
    return component.findings


@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_wrong_with_good_files(name: str, tmp_path: Path) -> None:
    assert findings_of(GOOD[name]().write(tmp_path / "model")) == ()


def test_the_corpora_are_as_large_as_promised() -> None:
    assert len(GOOD) >= 30
    assert len(BROKEN) >= 60


# ---- what breaks files: each changes a model in place


def change(name: str, function: Callable[[Tensor], Tensor | None]) -> Callable[[Model], None]:
    """Replaces a tensor, or removes it."""

    def apply(model: Model) -> None:
        changed = function(model.tensors.pop(name))
        if changed is not None:
            model.tensors[name] = changed

    return apply


def everywhere(suffix: str, function: Callable[[Tensor], Tensor | None]) -> Callable[[Model], None]:
    """Replaces the tensors of all layers."""

    def apply(model: Model) -> None:
        for stem in LAYERS:
            change(f"{stem}.{suffix}", function)(model)

    return apply


def remove(tensor: Tensor) -> None:
    return None


def add(name: str, tensor: Tensor) -> Callable[[Model], None]:
    return lambda model: model.tensors.update({name: tensor})


def say(**keys: Any) -> Callable[[Model], None]:
    """Changes keys of the block; None removes them."""

    def apply(model: Model) -> None:
        model.block.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del model.block[key]

    return apply


def entry(index: int, value: float) -> Callable[[Tensor], Tensor]:
    """Sets one element."""

    def apply(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        bits = changed.view(torch.uint8) if changed.dtype is torch.float8_e4m3fn else changed
        bits.view(-1)[index] = value
        return changed

    return apply


def scrambled(tensor: Tensor) -> Tensor:
    lot = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(1))
    return tensor.flatten().view(torch.uint8)[lot].view(tensor.dtype).view_as(tensor)


def unswizzled(tensor: Tensor) -> Tensor:
    return unswizzle_scales(tensor, *tensor.shape)


def listed(change_list: Callable[[list[str]], list[str]], key: str = "ignored_layers") -> Callable[[Model], None]:
    return lambda model: model.block.update({key: change_list(model.block[key])})


def move(stem: str, suffix: str) -> Callable[[Model], None]:
    return lambda model: model.tensors.update({f"{stem}.{suffix}": model.tensors[f"{Q}.{suffix}"]})


def rename(old: str, new: str) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        model.tensors = {name.replace(old, new): tensor for name, tensor in model.tensors.items()}

    return apply


def mark(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def marked(text: str) -> Callable[[Model], None]:
    """Gives a layer another mark than the one of ComfyUI that it has."""
    return both(add(f"{Q}.comfy_quant", mark(text)), lambda model: model.metadata.clear())


#: Suffix of the JSON that bitsandbytes has beside each weight.
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


def stated(**facts: Any) -> Callable[[Tensor], Tensor]:
    """Changes facts in the JSON of a layer of bitsandbytes."""
    return lambda text: mark(json.dumps({**json.loads(bytes(text.tolist())), **facts}))


def label(**labels: str) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        assert model.labels is not None
        model.labels.update({f"{Q}.{leaf}": text for leaf, text in labels.items()})

    return apply


def both(*changes: Callable[[Model], None]) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        for each in changes:
            each(model)

    return apply


def halved_grid(model: Model) -> None:
    """Scales that are 16 times too large for their blocks."""
    everywhere("weight", lambda codes: (codes.float() / 16).to(codes.dtype))(model)
    everywhere("weight_scale", lambda scales: scales + 4)(model)


def _as_sidecar(model: Model) -> None:
    model.sidecar = model.config.pop("quantization_config")


OMNI = "vllm-omni"
Base = Callable[[], Model]
Case = tuple[Base, Callable[[Model], None], str, str]  # model, damage, check, layer


def on(dialect: str, method: str, hidden: int = 256) -> Base:
    return lambda: written(dialect, method, hidden)


def of_class(name: str) -> Callable[[Model], None]:
    def rename_class(model: Model) -> None:
        model.config["_class_name"] = name

    return rename_class


BROKEN: dict[str, Case] = {
    "a model that is built in full precision": (
        on(OMNI, "fp8"), of_class("SD3Transformer2DModel"), "unsupported-family", "",
    ),
    "a method that the model has no loader for": (
        on("modelopt", "nvfp4"), of_class("WanTransformer3DModel"), "unsupported-family", "",
    ),
    "a block that the model has no loader for": (
        on("modelopt", "fp8"), of_class("WanTransformer3DModel"), "unsupported-family", "",
    ),
    "a block of ModelOpt's that the runtime reads in a mixture alone": (
        on("modelopt", "mxfp8"),
        lambda model: model.config.update(quantization_config={"quant_method": "modelopt", "quant_algo": "MXFP8"}),
        "bad-block", "",
    ),
    "an exception that ends as a quantized layer does": (
        on("auto-round", "w4a16"),
        lambda model: model.config["quantization_config"].update(extra_config={"to_q": {"bits": 16}}),
        "ignored-but-quantized", Q,
    ),
    "a model whose layers in the runtime nobody knows": (
        on(OMNI, "fp8"), of_class("PixArtTransformer2DModel"), "unknown-scope", "",
    ),
    # companions
    "fp8 without scale": (on(OMNI, "fp8"), change(f"{Q}.weight_scale", remove), "missing-companion", Q),
    "int8 without scale": (on(OMNI, "int8"), change(f"{W2}.weight_scale", remove), "missing-companion", W2),
    "mxfp8 without scale": (on(OMNI, "mxfp8"), change(f"{Q}.weight_scale", remove), "missing-companion", Q),
    "nvfp4 without block scale": (on("modelopt", "nvfp4"), change(f"{Q}.weight_scale", remove), "missing-companion", Q),
    "nvfp4 without global scale": (
        on("modelopt", "nvfp4"), change(f"{Q}.weight_scale_2", remove), "missing-companion", Q,
    ),
    "dual-scale without mul_scale": (
        on(OMNI, "mxfp4_dualscale"), change(f"{Q}.mul_scale", remove), "missing-companion", f"{Q}.mul_scale",
    ),
    "dual-scale without the coarse scale": (
        on(OMNI, "mxfp4_dualscale"), change(f"{Q}.weight_dual_scale", remove), "block-mismatch", Q,
    ),
    "modelopt fp8 without input_scale": (
        on("modelopt", "fp8 static"), everywhere("input_scale", remove), "missing-companion", f"{Q}.input_scale",
    ),
    "static without one input_scale": (
        on(OMNI, "fp8 static"), change(f"{W1}.input_scale", remove), "block-mismatch", W1,
    ),
    "dynamic with input_scale": (on(OMNI, "fp8"), add(f"{W1}.input_scale", torch.tensor(0.1)), "block-mismatch", W1),
    "smooth without one mul_scale": (on(OMNI, "mxfp4 smooth"), change(f"{W2}.mul_scale", remove), "block-mismatch", W2),
    "scale beside bf16": (
        on(OMNI, "fp8"), add(f"{KEPT[0]}.weight_scale", torch.tensor(0.1)), "extra-companion", KEPT[0],
    ),
    "scale without weight": (on(OMNI, "fp8"), add("ghost.weight_scale", torch.tensor(0.1)), "extra-companion", "ghost"),
    "codes as bf16 beside scales": (
        on(OMNI, "mxfp8"), change(f"{Q}.weight", lambda codes: codes.to(torch.bfloat16)), "extra-companion", Q,
    ),
    "unmarked layer": (
        on("comfyui", "fp8"),
        both(change(f"{Q}.comfy_quant", remove), lambda model: model.metadata.clear()),
        "missing-companion", Q,
    ),
    "codes of nothing": (
        lambda: Model(originals()), change(f"{Q}.weight", lambda w: (w / w.abs().max() * 448).to(torch.float8_e4m3fn)),
        "missing-companion", Q,
    ),
    # dtypes and shapes
    "fp8 scale of two dimensions": (on(OMNI, "fp8"), change(f"{Q}.weight_scale", column), "wrong-shape", Q),
    "int8 scale of one dimension": (on(OMNI, "int8"), change(f"{Q}.weight_scale", torch.flatten), "wrong-shape", Q),
    "int8 scale for all": (on(OMNI, "int8"), change(f"{Q}.weight_scale", lambda scale: scale[0, 0]), "wrong-shape", Q),
    "cut block scales": (on(OMNI, "mxfp8"), change(f"{Q}.weight_scale", lambda scale: scale[:, :5]), "wrong-shape", Q),
    "cut global scale": (
        on("modelopt", "nvfp4"), change(f"{Q}.weight_scale_2", lambda scale: scale.expand(256)), "wrong-shape", Q,
    ),
    "block scales as floats": (
        on(OMNI, "mxfp8"), change(f"{Q}.weight_scale", lambda scale: 2.0 ** (scale.float() - 127)), "wrong-shape", Q,
    ),
    "block scales in another dtype": (
        on("comfyui", "nvfp4"), change(f"{Q}.weight_scale", lambda scale: scale.view(torch.uint8)), "wrong-dtype", Q,
    ),
    "E8M0 where bytes are due": (
        on(OMNI, "mxfp8"), everywhere("weight_scale", lambda scale: scale.view(torch.float8_e8m0fnu)), "silent-cast", Q,
    ),
    "E8M0 where modelopt has bytes": (
        on("modelopt", "mxfp8"),
        everywhere("weight_scale", lambda scale: scale.view(torch.float8_e8m0fnu)), "silent-cast", Q,
    ),
    "bf16 scale": (on(OMNI, "fp8"), everywhere("weight_scale", Tensor.bfloat16), "low-precision-scale", W2),
    "bf16 row scales": (on("comfyui", "int8"), everywhere("weight_scale", Tensor.bfloat16), "low-precision-scale", Q),
    "fp16 scales": (lambda: bfl("fp8 rows"), everywhere("weight_scale", Tensor.half), "low-precision-scale", Q),
    "last block of transformers cut short": (lambda: transformers(hidden=96), say(), "indivisible-width", Q),
    "width that blocks do not divide": (on(OMNI, "mxfp4"), lambda model: _odd_dual(model), "indivisible-width", Q),
    # order
    "mxfp8 swizzled": (on(OMNI, "mxfp8"), everywhere("weight_scale", swizzle_scales), "scale-order", Q),
    "mxfp8 searched, swizzled": (
        on(OMNI, "mxfp8 searched"), everywhere("weight_scale", swizzle_scales), "scale-order", W1,
    ),
    "mxfp8 swizzled and padded": (
        on(OMNI, "mxfp8", 192), everywhere("weight_scale", swizzle_scales), "scale-order", Q,
    ),
    "mxfp4 swizzled": (on(OMNI, "mxfp4"), everywhere("weight_scale", swizzle_scales), "scale-order", Q),
    "dual-scale swizzled": (on(OMNI, "mxfp4_dualscale"), everywhere("weight_scale", swizzle_scales), "scale-order", Q),
    "nvfp4 swizzled": (on("modelopt", "nvfp4"), everywhere("weight_scale", swizzle_scales), "scale-order", Q),
    "nvfp4 swizzled and padded": (
        on("modelopt", "nvfp4", 208), change(f"{Q}.weight_scale", swizzle_scales), "scale-order", Q,
    ),
    "nvfp4 swizzled for vLLM": (
        on("compressed-tensors", "nvfp4"), everywhere("weight_scale", swizzle_scales), "scale-order", Q,
    ),
    "comfyui's mxfp8 linear": (on("comfyui", "mxfp8"), everywhere("weight_scale", unswizzled), "scale-order", Q),
    "comfyui's nvfp4 linear": (on("comfyui", "nvfp4"), everywhere("weight_scale", unswizzled), "scale-order", Q),
    "comfyui's mxfp8 linear, not padded": (
        on("comfyui", "mxfp8", 96),
        change(f"{Q}.weight_scale", lambda scale: unswizzle_scales(scale, 96, 3)), "scale-order", Q,
    ),
    "unmarked nvfp4 swizzled": (lambda: bfl("nvfp4"), everywhere("weight_scale", swizzle_scales), "scale-order", Q),
    "lightx2v's linear": (lambda: lightx2v("nvfp4"), everywhere("weight_scale", unswizzled), "scale-order", Q),
    "scrambled mxfp8": (on(OMNI, "mxfp8"), everywhere("weight_scale", scrambled), "scale-order", Q),
    "scrambled nvfp4": (on("modelopt", "nvfp4"), everywhere("weight_scale", scrambled), "scale-order", Q),
    # values
    "mxfp8 byte 255": (on(OMNI, "mxfp8"), change(f"{Q}.weight_scale", entry(77, 255)), "e8m0-nan", Q),
    "mxfp4 byte 255": (on(OMNI, "mxfp4"), change(f"{W1}.weight_scale", entry(-1, 255)), "e8m0-nan", W1),
    "dual-scale byte 255": (on(OMNI, "mxfp4_dualscale"), change(f"{Q}.weight_scale", entry(0, 255)), "e8m0-nan", Q),
    "comfyui byte 255": (on("comfyui", "mxfp8"), change(f"{Q}.weight_scale", entry(5, 255)), "e8m0-nan", Q),
    "NaN scale": (on(OMNI, "fp8"), change(f"{Q}.weight_scale", torch.Tensor.log), "non-positive-scale", Q),
    "Inf scale": (on(OMNI, "int8"), change(f"{Q}.weight_scale", entry(9, float("inf"))), "non-finite", Q),
    "NaN block scale": (on("modelopt", "nvfp4"), change(f"{Q}.weight_scale", entry(9, 0x7F)), "non-finite", Q),
    "scale 0": (on(OMNI, "fp8"), change(f"{Q}.weight_scale", torch.zeros_like), "non-positive-scale", Q),
    "block scale 0": (on("comfyui", "nvfp4"), change(f"{Q}.weight_scale", entry(9, 0)), "non-positive-scale", Q),
    "negative row scale": (on(OMNI, "int8"), change(f"{Q}.weight_scale", entry(3, -0.1)), "non-positive-scale", Q),
    "coarse scale Inf": (
        on(OMNI, "mxfp4_dualscale"), change(f"{Q}.weight_dual_scale", entry(0, float("inf"))), "non-finite", Q,
    ),
    "mul_scale 0": (on(OMNI, "mxfp4 smooth"), change(f"{OUT}.mul_scale", entry(0, 0)), "non-positive-scale", OUT),
    "mul_scale not in bf16": (
        on(OMNI, "mxfp4 smooth"), everywhere("mul_scale", lambda scale: scale + 0.001), "inexact-smoothing", OUT,
    ),
    "NaN code": (on(OMNI, "fp8"), change(f"{W2}.weight", entry(1000, 0xFF)), "non-finite", W2),
    "NaN in a norm": (
        on(OMNI, "fp8"),
        change("layers.0.attention_norm1.weight", lambda norm: norm * float("nan")), "non-finite", "norm",
    ),
    "mxfp4 off the grid": (on(OMNI, "mxfp4"), change(f"{Q}.weight", entry(5, 0x3A)), "off-grid", Q),
    "dual-scale off the grid": (on(OMNI, "mxfp4_dualscale"), change(f"{W2}.weight", entry(5, 0x3A)), "off-grid", W2),
    "scales too large": (on(OMNI, "mxfp8"), halved_grid, "unused-range", Q),
    "scales of another model": (
        on(OMNI, "mxfp8"), change(f"{Q}.weight_scale", lambda scale: scale + 40), "implausible-scale", Q,
    ),
    # reciprocals
    "fp8 reciprocal": (on(OMNI, "fp8"), everywhere("weight_scale", torch.reciprocal), "reciprocal-scale", Q),
    "fp8 reciprocal blocks": (
        on(OMNI, "fp8 blocks"), everywhere("weight_scale_inv", torch.reciprocal), "reciprocal-scale", Q,
    ),
    "transformers' reciprocal": (transformers, everywhere("weight_scale_inv", torch.reciprocal), "reciprocal-scale", Q),
    "int8 reciprocal": (on("comfyui", "int8"), everywhere("weight_scale", torch.reciprocal), "reciprocal-scale", Q),
    "nvfp4 reciprocal": (
        on("modelopt", "nvfp4"), everywhere("weight_scale_2", torch.reciprocal), "reciprocal-scale", Q,
    ),
    "comfyui's nvfp4 reciprocal": (
        on("comfyui", "nvfp4"), everywhere("weight_scale_2", torch.reciprocal), "reciprocal-scale", Q,
    ),
    "compressed-tensors not reciprocal": (
        on("compressed-tensors", "nvfp4"), everywhere("weight_global_scale", torch.reciprocal), "reciprocal-scale", Q,
    ),
    "lightx2v not reciprocal": (
        lambda: lightx2v("nvfp4"), everywhere("weight_global_scale", torch.reciprocal), "reciprocal-scale", Q,
    ),
    "mxfp8 reciprocal": (on(OMNI, "mxfp8"), everywhere("weight_scale", lambda s: 254 - s), "reciprocal-scale", Q),
    "input scale reciprocal": (
        on("modelopt", "nvfp4 static"), everywhere("input_scale", torch.reciprocal), "reciprocal-scale", Q,
    ),
    # groups
    "nvfp4 global scales differ": (
        on("modelopt", "nvfp4"), change(f"{K}.weight_scale_2", lambda s: s * 2), "fused-members-differ", K,
    ),
    "mul_scales differ": (
        on(OMNI, "mxfp4_dualscale"), change(f"{V}.mul_scale", lambda s: s * 2), "fused-members-differ", V,
    ),
    "fp8 scales differ": (on(OMNI, "fp8"), change(f"{V}.weight_scale", lambda s: s * 2), "fused-members-differ", Q),
    "int8 scales differ": (on(OMNI, "int8"), change(f"{V}.weight_scale", entry(9, 0.01)), "fused-members-differ", Q),
    "one of three not quantized": (
        on(OMNI, "fp8"),
        both(change(f"{K}.weight_scale", remove), change(f"{K}.weight", Tensor.bfloat16)), "half-quantized-group", K,
    ),
    "merged name not ignored": (
        on(OMNI, "fp8"),
        listed(lambda names: [n for n in names if not n.endswith("to_qkv")]), "half-ignored-group", KEPT[0],
    ),
    "part not ignored": (
        on(OMNI, "fp8"), listed(lambda names: [n for n in names if n != KEPT[1]]), "half-ignored-group", KEPT[0],
    ),
    "nothing ignored": (on(OMNI, "fp8"), say(ignored_layers=[]), "not-ignored", KEPT[0]),
    "quantized layer ignored": (on(OMNI, "fp8"), listed(lambda names: [*names, Q]), "ignored-but-quantized", Q),
    "pattern ignored": (on(OMNI, "fp8"), listed(lambda names: [*names, "img_mlp"]), "ignored-unmatched", "img_mlp"),
    "modelopt pattern of nothing": (
        on("modelopt", "nvfp4"), listed(lambda names: [*names, "single_*"], "ignore"), "ignored-unmatched", "single_*",
    ),
    "embedder quantized": (
        on(OMNI, "int8"),
        both(add(f"{OUTSIDE}.weight", torch.ones(256, 64, dtype=torch.int8)), move(OUTSIDE, "weight_scale")),
        "not-built-quantized", OUTSIDE,
    ),
    # config blocks
    "unknown key": (on(OMNI, "fp8"), say(producer="me"), "unknown-key", ""),
    "modules_to_not_convert": (on(OMNI, "int8"), say(modules_to_not_convert=["lm_head"]), "unknown-key", ""),
    "unknown key of vLLM": (on("compressed-tensors", "fp8"), say(ignroe=[]), "unknown-key", ""),
    "no flag, fp8": (on(OMNI, "fp8"), say(is_checkpoint_fp8_serialized=None), "no-serialized-flag", ""),
    "no flag, mxfp8": (on(OMNI, "mxfp8"), say(is_checkpoint_mxfp8_serialized=None), "no-serialized-flag", ""),
    "flag false": (on(OMNI, "fp8"), say(is_checkpoint_fp8_serialized=False), "no-serialized-flag", ""),
    "no block": (on(OMNI, "fp8"), lambda model: model.config.pop("quantization_config"), "no-block", ""),
    "unknown method": (on(OMNI, "fp8"), say(quant_method="fp9"), "unknown-method", ""),
    "block in a file beside config.json": (older_modelopt, _as_sidecar, "no-block", ""),
    "method of others": (
        on(OMNI, "int8"), say(quant_method="fp8", is_checkpoint_fp8_serialized=True), "block-mismatch", Q,
    ),
    "other block size": (on(OMNI, "fp8 blocks"), say(weight_block_size=[32, 32]), "block-mismatch", Q),
    "other block size of transformers": (transformers, say(weight_block_size=[128, 128]), "block-mismatch", Q),
    "scales of transformers called floats": (
        on("transformers", "mxfp8"), say(scale_fmt="float"), "block-mismatch", Q,
    ),
    "scheme of int8": (on(OMNI, "int8"), say(activation_scheme="static"), "bad-block", ""),
    "other algorithm": (on("modelopt", "mxfp8"), say(quant_algo="NVFP4", config_groups={}), "bad-block", ""),
    "nvfp4 called mxfp8": (on("modelopt", "nvfp4"), say(quant_algo="MXFP8"), "block-mismatch", Q),
    "fp8 called int8": (on("compressed-tensors", "fp8"), say(format="int-quantized"), "block-mismatch", Q),
    "other groups": (lambda: auto_round("int4"), say(group_size=128), "block-mismatch", Q),
    # marks and labels
    "marks disagree": (
        on("comfyui", "fp8"), add(f"{Q}.comfy_quant", mark('{"format": "float8_e5m2"}')), "bad-mark", Q,
    ),
    "mark of another format": (
        on("comfyui", "int8"),
        both(add(f"{Q}.comfy_quant", mark('{"format": "float8_e4m3fn"}')), lambda model: model.metadata.clear()),
        "bad-mark", Q,
    ),
    "mark of no format": (on("comfyui", "fp8"), add(f"{Q}.comfy_quant", mark('{"format": "fp2"}')), "bad-mark", Q),
    "mark of nothing": (on("comfyui", "fp8"), add(f"{Q}.comfy_quant", mark("{")), "bad-mark", Q),
    "header names a layer that is not there": (
        marked_in_header,
        both(change(f"{Q}.weight", remove), change(f"{Q}.weight_scale", remove)), "missing-companion", Q,
    ),
    "sentinel of another dtype": (
        lambda: legacy(torch.float8_e5m2), add("scaled_fp8", torch.zeros(2, dtype=torch.float8_e4m3fn)), "bad-mark", Q,
    ),
    "weight_scale for scale_weight": (
        lambda: legacy(torch.float8_e4m3fn), rename("scale_weight", "weight_scale"), "missing-companion", Q,
    ),
    "legacy scale without weight": (
        lambda: legacy(torch.float8_e4m3fn), change(f"{Q}.weight", remove), "missing-companion", Q,
    ),
    "label of another type": (lambda: msmodelslim("int8"), label(weight="W8A8_MXFP8"), "block-mismatch", Q),
    "label of no type": (lambda: msmodelslim("int8"), label(weight="W2A2"), "bad-mark", Q),
    "label FLOAT": (lambda: msmodelslim("mxfp8"), label(weight="FLOAT"), "missing-companion", Q),
    "label of no tensor": (lambda: msmodelslim("mxfp8"), label(ghost="W8A8_MXFP8"), "bad-mark", f"{Q}.ghost"),
    "offsets": (
        lambda: msmodelslim("int8"), change(f"{Q}.weight_offset", lambda offset: offset + 1), "unreadable-layer", Q,
    ),
    "reordered columns": (
        lambda: auto_round("int4"), add(f"{Q}.g_idx", torch.zeros(256, dtype=torch.int32)), "unreadable-layer", Q,
    ),
    "integers without scales": (lambda: auto_round("int4"), change(f"{Q}.scales", remove), "missing-companion", Q),
    # rotated weights
    "rotated int8 without scale": (
        on("comfyui", "int8 rotated"), change(f"{Q}.weight_scale", remove), "missing-companion", Q,
    ),
    "rotated int8 with a negative scale": (
        on("comfyui", "int8 rotated"), change(f"{Q}.weight_scale", entry(3, -0.1)), "non-positive-scale", Q,
    ),
    "a rotation of groups that do not divide the columns": (
        on("comfyui", "int8 rotated"),
        marked('{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 1024}'), "bad-mark", Q,
    ),
    "convrot_w4a4 without scale": (
        on("comfyui", "convrot_w4a4"), change(f"{Q}.weight_scale", remove), "missing-companion", Q,
    ),
    "convrot_w4a4 scale Inf": (
        on("comfyui", "convrot_w4a4"), change(f"{Q}.weight_scale", entry(9, float("inf"))), "non-finite", Q,
    ),
    "w4a8 called w4a4": (
        on("comfyui", "grid w4a8"),
        marked('{"format": "convrot_w4a4", "convrot_groupsize": 256}'), "missing-companion", Q,
    ),
    "w4a8 without levels": (
        on("comfyui", "grid w4a8"), change(f"{Q}.weight_codebook", remove), "missing-companion", Q,
    ),
    "w4a8 level NaN": (
        on("comfyui", "grid w4a8"), change(f"{Q}.weight_codebook", entry(3, float("nan"))), "non-finite", Q,
    ),
    "w4a8 step NaN": (on("comfyui", "grid w4a8"), change(f"{Q}.weight_s_rel", entry(9, 0x7F)), "non-finite", Q),
    "w6a8 row step 0": (
        on("comfyui", "grid w6a8"), change(f"{Q}.weight_s_channel", entry(9, 0)), "non-positive-scale", Q,
    ),
    "w6a8 without row steps": (
        on("comfyui", "grid w6a8"), change(f"{Q}.weight_s_channel", remove), "missing-companion", Q,
    ),
    "w6a8 cut": (on("comfyui", "grid w6a8"), change(f"{Q}.weight", lambda codes: codes[:, :-1]), "unreadable-layer", Q),
    # AutoRound's MX and NVFP4
    "auto-round mxfp8 byte 255": (
        on("auto-round", "mxfp8"), change(f"{Q}.weight_scale", entry(5, 255)), "e8m0-nan", Q,
    ),
    "auto-round mxfp4 without scale": (
        on("auto-round", "mxfp4"), change(f"{Q}.weight_scale", remove), "missing-companion", Q,
    ),
    "auto-round mxfp4 called mxfp8": (on("auto-round", "mxfp4"), say(bits=8), "block-mismatch", Q),
    "auto-round nvfp4 not reciprocal": (
        on("auto-round", "nvfp4 static"), everywhere("weight_global_scale", torch.reciprocal), "reciprocal-scale", Q,
    ),
    "auto-round nvfp4 without one input scale": (
        on("auto-round", "nvfp4 static"), change(f"{Q}.input_global_scale", remove), "missing-companion", Q,
    ),
    # NF4
    "nf4 without absmax": (on("bitsandbytes", "nf4"), change(f"{Q}.weight.absmax", remove), "missing-companion", Q),
    "nf4 without table": (on("bitsandbytes", "nf4"), change(f"{Q}.weight.quant_map", remove), "missing-companion", Q),
    "nf4 absmax NaN": (
        on("bitsandbytes", "nf4"), change(f"{Q}.weight.absmax", entry(9, float("nan"))), "non-finite", Q,
    ),
    "nf4 absmax negative": (
        on("bitsandbytes", "nf4"), change(f"{Q}.weight.absmax", entry(9, -1.0)), "non-positive-scale", Q,
    ),
    "nf4 absmax cut": (
        on("bitsandbytes", "nf4"), change(f"{Q}.weight.absmax", lambda each: each[:-1]), "wrong-shape", Q,
    ),
    "nf4 table NaN": (
        on("bitsandbytes", "nf4"), change(f"{Q}.weight.quant_map", entry(3, float("nan"))), "non-finite", Q,
    ),
    "nf4 state of another shape": (
        on("bitsandbytes", "nf4"), change(f"{Q}.{NF4_STATE}", stated(shape=[256, 512])), "wrong-shape", Q,
    ),
    "nf4 state of no shape": (
        on("bitsandbytes", "nf4"), change(f"{Q}.{NF4_STATE}", stated(shape=None)), "bad-mark", Q,
    ),
    "nf4 nested scale Inf": (
        on("bitsandbytes", "nf4 nested"), change(f"{Q}.weight.nested_absmax", entry(0, float("inf"))), "non-finite", Q,
    ),
    "nf4 nested without its table": (
        on("bitsandbytes", "nf4 nested"), change(f"{Q}.weight.nested_quant_map", remove), "missing-companion", Q,
    ),
    "nf4 nested offset NaN": (
        on("bitsandbytes", "nf4 nested"), change(f"{Q}.{NF4_STATE}", stated(nested_offset=float("nan"))), "bad-mark", Q,
    ),
}  # fmt: skip


def _odd_dual(model: Model) -> None:
    """A dual-scale layer of 96 columns, which 64 does not divide."""
    made = Mxfp4(search=False).quantize(torch.randn(256, 96, generator=torch.Generator().manual_seed(0)))
    made |= {"weight_dual_scale": torch.ones(256, 1, 1), "mul_scale": torch.ones(96)}
    model.tensors |= {f"{Q}.{suffix}": tensor for suffix, tensor in made.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_found(name: str, tmp_path: Path) -> None:
    make, damage, check, layer = BROKEN[name]
    model = make()
    damage(model)
    findings = findings_of(model.write(tmp_path / "model"))
    assert any(found.check == check and layer in found.layer for found in findings), findings
    for found in findings:
        assert found.check in CHECKS
        assert found.what
        assert found.remedy
        assert "\n" not in found.what + found.hurts + found.remedy
        assert str(tmp_path) not in found.what


def errors_of(folder: Path, reference: Path) -> dict[str, float]:
    (component,) = verify_source(Source(folder, "model"), Source(reference, "reference"))
    assert component.findings == ()
    return component.errors


@pytest.mark.parametrize(
    ("dialect", "method", "limit"),
    [(OMNI, "int8", 0.02), (OMNI, "mxfp8", 0.04), ("comfyui", "nvfp4", 0.12), (OMNI, "mxfp4_dualscale", 0.13)],
)
def test_a_reference_gives_the_error_of_every_layer(tmp_path: Path, dialect: str, method: str, limit: float) -> None:
    Model(originals()).write(tmp_path / "original")
    errors = errors_of(written(dialect, method).write(tmp_path / "model"), tmp_path / "original")
    assert errors.keys() == set(LAYERS)
    assert 0.001 < max(errors.values()) < limit


def test_what_only_a_reference_could_tell_is_said(tmp_path: Path) -> None:
    folder = written(OMNI, "mxfp4_dualscale").write(tmp_path / "model")
    original = Model(originals()).write(tmp_path / "original")
    (alone,) = verify_source(Source(folder, "model"))
    assert [what.split()[-1] for what in alone.unchecked] == ["nibbles", "stored", "common"]
    (compared,) = verify_source(Source(folder, "model"), Source(original, "original"))
    assert compared.unchecked == ()


def swapped(codes: Tensor) -> Tensor:
    return (codes << 4) | (codes >> 4)


def swapped_values(values: Tensor) -> Tensor:
    return values.view(torch.uint8).view(len(values), -1, 2).flip(-1).flatten(1).view(values.dtype)


def _exchanged(model: Model) -> None:
    for suffix in ("weight", "weight_scale"):
        first, second = f"{K}.{suffix}", f"{V}.{suffix}"
        model.tensors[first], model.tensors[second] = model.tensors[second], model.tensors[first]


def _shifted_scales(model: Model) -> None:
    """Three layers in a circle have each other's scales."""
    scales = [model.tensors[f"{stem}.scales"] for stem in (Q, K, OUT)]
    model.tensors |= {f"{stem}.scales": scale for stem, scale in zip((Q, K, OUT), scales[1:] + scales[:1], strict=True)}


BROKEN["w4a16 with scales of other layers"] = (
    on("auto-round", "w4a16"), _shifted_scales, "exchanged-scales", f"{Q}.scales",
)  # fmt: skip


@pytest.mark.parametrize("name", [*GOOD, *BROKEN])
def test_all_commands_agree_whether_the_meaning_is_certain(name: str, tmp_path: Path) -> None:
    make, damage = (GOOD[name], lambda _: None) if name in GOOD else BROKEN[name][:2]
    model, pipeline = make(), tmp_path / "model"
    damage(model)
    pipeline.mkdir()
    model.config = model.config or {"_class_name": CLASS}
    component = model.write(pipeline / "transformer")
    (pipeline / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", CLASS]}))
    source = Source(pipeline, "model")
    with Checkpoint.open(component) as checkpoint:
        reading = read_layers(describe(checkpoint, component))
        declared, doubtful = list(doubts(reading)), list(doubts(reading, values=True))
    errors = {found for each in verify_source(source) for found in each.findings if found.severity == "error"}
    assert {*declared} <= errors
    assert errors or not doubtful
    (shown,) = inspect_source(source)
    assert (shown.doubt is not None) is bool(declared)
    for method in ("dequantize", "fp8"):
        refused = (
            pytest.raises(CheckpointError) if doubtful else suppress(RecipeError, *[CheckpointError] * bool(errors))
        )
        with refused:
            plan_conversion(source, Recipe(method, runtime="diffusers"))
    with pytest.raises(CheckpointError) if doubtful else suppress(CheckpointError):
        refuse_undeclared(pipeline)


#: Properties that no file shows by itself.
BROKEN_BY_REFERENCE: dict[str, Case] = {
    "nibbles of modelopt": (on("modelopt", "nvfp4"), everywhere("weight", swapped), "nibble-order", f"{Q}.weight"),
    "nibbles of comfyui": (on("comfyui", "nvfp4"), everywhere("weight", swapped), "nibble-order", f"{W2}.weight"),
    "nibbles of lightx2v": (lambda: lightx2v("mxfp4"), everywhere("weight", swapped), "nibble-order", Q),
    "nibbles before unpacking": (on(OMNI, "mxfp4"), everywhere("weight", swapped_values), "nibble-order", Q),
    "mul_scale reciprocal": (
        on(OMNI, "mxfp4_dualscale"), lambda model: _smoothed_backwards(model), "reciprocal-scale", f"{Q}.mul_scale",
    ),
    "scales twice as large": (
        on(OMNI, "mxfp8"), everywhere("weight_scale", lambda scale: scale + 1), "differs-from-reference", Q,
    ),
    "layers exchanged": (on(OMNI, "int8"), _exchanged, "differs-from-reference", K),
    "kept layer changed": (
        on(OMNI, "int8"), change(f"{KEPT[3]}.weight", lambda weight: weight * 2), "differs-from-reference", KEPT[3],
    ),
    "layer of another model": (
        on(OMNI, "int8"), rename(OUT, OUT.replace("0", "7")), "not-in-reference", OUT.replace("0", "7"),
    ),
}  # fmt: skip


def _smoothed_backwards(model: Model) -> None:
    """Columns were divided by 1/s, and 1/s is stored where s is due."""
    scale = torch.where(torch.arange(256) % 3 == 0, 4.0, 1.0)
    weight = originals()[f"{Q}.weight"].float() / scale
    model.tensors |= {f"{Q}.{suffix}": tensor for suffix, tensor in Mxfp4DualScale().quantize(weight).items()}
    for stem in (Q, K, V):
        model.tensors[f"{stem}.mul_scale"] = 1 / scale


@pytest.mark.parametrize("name", BROKEN_BY_REFERENCE)
def test_what_only_a_reference_tells_is_found_with_one(name: str, tmp_path: Path) -> None:
    make, damage, check, layer = BROKEN_BY_REFERENCE[name]
    model = make()
    damage(model)
    Model(originals()).write(tmp_path / "original")
    folder = model.write(tmp_path / "model")
    assert not any(found.check == check for found in findings_of(folder))
    findings = findings_of(folder, tmp_path / "original")
    assert any(found.check == check and layer in found.layer for found in findings), findings


def test_a_reference_of_another_model_is_refused(tmp_path: Path) -> None:
    other = Model({"blocks.0.proj.weight": torch.ones(4, 4)}).write(tmp_path / "other")
    model = written(OMNI, "fp8").write(tmp_path / "model")
    result = CliRunner().invoke(main, ["verify", str(model), "--reference", str(other)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {other}: found none of the 7 quantized layers")


def test_damaged_files_are_findings(tmp_path: Path) -> None:
    folder = written(OMNI, "fp8").write(tmp_path / "model")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])
    (found,) = findings_of(folder)
    assert found.check == "damaged-file"
    report = CliRunner().invoke(main, ["verify", str(folder)]).output
    assert report.startswith("model: cannot be read\n")
    assert f"{folder / WEIGHTS}: found" in " ".join(report.split())
    assert report.count("again") == 1  # one remedy
    (folder / WEIGHTS).write_bytes(whole)
    (folder / "config.json").write_text("{")
    (found,) = findings_of(folder)
    assert (found.check, found.severity) == ("damaged-file", "error")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(component={"text_encoder": "fp8"}),
        Recipe("int8", component={"vae": "fp8_storage"}, runtime="diffusers"),  # layers that vLLM-Omni does not build
    ],
    ids=["for vLLM-Omni", "for our loader"],
)
def test_everything_we_write_of_a_pipeline_is_right(tiny_pipeline_folder: Path, tmp_path: Path, recipe: Recipe) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    arguments = ["verify", str(tmp_path / "out"), "--reference", str(tiny_pipeline_folder)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "0 errors, 0 warnings" in result.output
    assert "against the reference: median error" in result.output
    document = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    compared = {component["name"] for component in document["components"] if component["errors"]}
    assert compared == {"transformer", *recipe.component}


def test_files_are_those_that_the_manifest_says_were_written(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(tiny_pipeline_folder, out, Recipe())
    weights = out / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # a bit of a number, which no check of values can notice
    weights.write_bytes(content)
    (out / "scheduler" / "scheduler_config.json").unlink()
    (out / "README.md").write_text("My own words.")
    found = {
        (component.name, finding.severity, finding.layer)
        for component in verify_source(Source(out, "out"))
        for finding in component.findings
        if finding.check == "changed-file"
    }
    first = verify_source(Source(out, "out"))[0].name
    assert found == {
        ("transformer", "error", "transformer/diffusion_pytorch_model.safetensors"),
        (first, "error", "scheduler/scheduler_config.json"),
        (first, "warning", "README.md"),
    }


def test_a_manifest_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = written(OMNI, "fp8").write(tmp_path / "model")
    (tmp_path / "secret").write_text("")
    names = ["../secret", str(tmp_path / "secret"), "a/../../secret"]
    impossible = ["a\0b", "a\ud800b"]
    (folder / "omni_convert.json").write_text(
        json.dumps({"files": dict.fromkeys(names + impossible, "0"), "recipe": 1})
    )
    findings = findings_of(folder)
    assert {finding.layer for finding in findings} == {*names, *impossible}
    assert all("outside of the folder" in finding.what for finding in findings if finding.layer in names)


@pytest.mark.parametrize("text", ["{", '{"files": []}', '{"files": {"config.json": 5}}', "{}"])
def test_a_damaged_manifest_is_a_finding(tmp_path: Path, text: str) -> None:
    folder = written(OMNI, "fp8").write(tmp_path / "model")
    (folder / "omni_convert.json").write_text(text)
    (found,) = findings_of(folder)
    assert (found.check, found.layer) == ("damaged-file", "omni_convert.json")


def test_layers_of_the_text_encoder_must_be_ignored_as_well(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("int8"))
    path = tmp_path / "out" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    names = config["quantization_config"]["ignored_layers"]
    config["quantization_config"]["ignored_layers"] = [name for name in names if name != "lm_head"]
    path.write_text(json.dumps(config))
    components = verify_source(Source(tmp_path / "out", "out"))
    found = {(finding.check, finding.layer) for component in components for finding in component.findings}
    assert found == {("not-ignored", "lm_head"), ("changed-file", "transformer/config.json")}


def test_layers_of_a_quantized_text_encoder_must_not_be_ignored(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(component={"text_encoder": "fp8"}))
    path = tmp_path / "out" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignored_layers"] += ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    path.write_text(json.dumps(config))
    findings = [f for component in verify_source(Source(tmp_path / "out", "out")) for f in component.findings]
    assert {(finding.check, finding.layer) for finding in findings} == {
        ("ignored-but-quantized", "model.layers.0.mlp.up_proj"),
        ("changed-file", "transformer/config.json"),
    }
    assert any("text encoder and 1 more in the ignored list" in finding.what for finding in findings)


def test_the_command_tells_what_where_whom_and_what_to_do(tmp_path: Path) -> None:
    model = written(OMNI, "mxfp8")
    everywhere("weight_scale", swizzle_scales)(model)
    folder = model.write(tmp_path / "model")
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0] == "model: 7 layers spelled as vllm-omni does"
    assert lines[1].split() == ["error", "scale-order", f"{LAYERS[1]}.weight_scale", "and", "6", "more"]
    assert "hurts:  vLLM-Omni: noise" in result.output
    assert "remedy: store the scales linear" in result.output
    assert lines[-2] == "not checked without --reference MODEL: a factor that all scales have in common"
    assert lines[-1] == "7 errors, 0 warnings"
    document = json.loads(CliRunner().invoke(main, ["verify", str(folder), "--json"]).output)
    assert (document["errors"], document["warnings"]) == (7, 0)
    found = document["components"][0]["findings"][0]
    assert found.keys() == {"severity", "check", "layer", "what", "hurts", "remedy"}


def test_warnings_alone_are_no_failure(tmp_path: Path) -> None:
    model = written(OMNI, "fp8")
    everywhere("weight_scale", Tensor.bfloat16)(model)
    result = CliRunner().invoke(main, ["verify", str(model.write(tmp_path / "model"))])
    assert result.exit_code == 0
    assert result.output.endswith("0 errors, 7 warnings\n")


def test_a_single_file_is_checked(tmp_path: Path) -> None:
    folder = written("comfyui", "nvfp4").write(tmp_path / "model")
    assert findings_of(folder / WEIGHTS) == ()


def test_every_check_is_proven_by_a_broken_file() -> None:
    proven = {check for _, _, check, _ in (*BROKEN.values(), *BROKEN_BY_REFERENCE.values())}
    elsewhere = {"damaged-file", "changed-file"}
    elsewhere |= {"no-architecture", "wrong-architecture", "unknown-names", "wrong-type", "long-name", "unused-bytes"}
    elsewhere |= {"missing-tensor", "misplaced-block", "part-of-merged-layer"}
    assert proven | elsewhere == CHECKS.keys()
