"""Prints which LoRA files are baked in: algorithm and naming by family, from runs on tiny models of diffusers' classes.

    python scripts/lora_table.py

Each cell stands for files of every naming, or of every algorithm. The weights are compared with dense ones that are
computed here in float64, by formulas of PEFT and LyCORIS. `tests/convert/source/test_lora_cases.py` runs these cases.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from tiny_models import MODELS  # type: ignore[import-not-found]  # beside it
from torch import Tensor

from omni_convert.convert.recipe import LoraRequest
from omni_convert.convert.source.lora import bake
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError

__all__ = ["ALGORITHMS", "FAMILIES", "NAMINGS", "Family", "error_of", "file_of", "save_family"]

RANK, ALPHA, BLOCK = 4, 2.0, 16
QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Family:
    """A tiny model, and some of its layers: original name → the names that diffusers gives to its parts."""

    model_class: str
    arguments: Mapping[str, Any]
    layers: Mapping[str, tuple[str, ...]]


def _parts(parent: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


def _known(name: str, layers: Mapping[str, tuple[str, ...]]) -> Family:
    model_class, arguments = MODELS[name]
    return Family(model_class, arguments, layers)


_DOUBLE = {
    "double_blocks.0.img_attn.qkv": _parts("transformer_blocks.0.attn", *QKV),
    "double_blocks.0.txt_attn.qkv": _parts("transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj"),
    "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn.to_out.0",),
}
_SINGLE = {"single_blocks.0.linear1": _parts("single_transformer_blocks.0", *(f"attn.{x}" for x in QKV), "proj_mlp")}
_MLP = {"double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj",)}
_WAN = {
    "blocks.0.self_attn.q": ("blocks.0.attn1.to_q",),
    "blocks.0.cross_attn.o": ("blocks.0.attn2.to_out.0",),
    "blocks.0.ffn.2": ("blocks.0.ffn.net.2",),
    "head.head": ("proj_out",),
}
_LTX = {
    "transformer_blocks.0.attn1.to_q": ("transformer_blocks.0.attn1.to_q",),
    "patchify_proj": ("proj_in",),
    "adaln_single.linear": ("time_embed.linear",),
}
#: Family → its model.
FAMILIES: dict[str, Family] = {
    "FLUX.1": _known("flux_1", {**_DOUBLE, **_MLP, **_SINGLE}),
    "FLUX.2": _known("flux_2", {**_DOUBLE, "single_blocks.0.linear2": ("single_transformer_blocks.0.attn.to_out",)}),
    "Chroma": _known(
        "chroma",
        {
            **_DOUBLE,
            **_MLP,
            **_SINGLE,
            "distilled_guidance_layer.layers.0.in_layer": ("distilled_guidance_layer.layers.0.linear_1",),
        },
    ),
    "Z-Image": _known(
        "z_image",
        {
            "layers.0.attention.qkv": _parts("layers.0.attention", *QKV),
            "layers.1.attention.out": ("layers.1.attention.to_out.0",),
            "noise_refiner.0.feed_forward.w1": ("noise_refiner.0.feed_forward.w1",),
        },
    ),
    "Qwen-Image": _known(
        "qwen_image",
        {name: (name,) for name in _parts("transformer_blocks.0", "attn.to_q", "img_mlp.net.2", "img_mod.1")},
    ),
    "Wan": _known("wan_i2v", {**_WAN, "blocks.0.cross_attn.k_img": ("blocks.0.attn2.add_k_proj",)}),
    "Wan VACE": _known(
        "wan_vace",
        {
            **_WAN,
            "vace_blocks.0.self_attn.k": ("vace_blocks.0.attn1.to_k",),
            "vace_blocks.0.after_proj": ("vace_blocks.0.proj_out",),
        },
    ),
    "Wan-Animate": _known(
        "wan_animate", {**_WAN, "face_adapter.fuser_blocks.0.linear1_kv": _parts("face_adapter.0", "to_k", "to_v")}
    ),
    "LTX-Video": _known("ltx_video", _LTX),
    "LTX-2": _known(
        "ltx_2",
        {
            **_LTX,
            "av_ca_a2v_gate_adaln_single.linear": ("av_cross_attn_video_a2v_gate.linear",),
            "transformer_blocks.0.audio_attn2.to_v": ("transformer_blocks.0.audio_attn2.to_v",),
        },
    ),
    "HunyuanVideo": _known(
        "hunyuan_video",
        {
            **_SINGLE,
            "double_blocks.0.img_attn_qkv": _parts("transformer_blocks.0.attn", *QKV),
            "double_blocks.0.txt_mlp.fc1": ("transformer_blocks.0.ff_context.net.0.proj",),
        },
    ),
    "HunyuanVideo-1.5": _known(
        "hunyuan_video_15",
        {
            "double_blocks.0.img_attn_q": ("transformer_blocks.0.attn.to_q",),
            "double_blocks.0.txt_attn_proj": ("transformer_blocks.0.attn.to_add_out",),
            "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": _parts(
                "context_embedder.token_refiner.refiner_blocks.0.attn", *QKV
            ),
        },
    ),
    "SD3": _known(
        "sd3",
        {
            "joint_blocks.0.x_block.attn.qkv": _parts("transformer_blocks.0.attn", *QKV),
            "joint_blocks.0.x_block.mlp.fc1": ("transformer_blocks.0.ff.net.0.proj",),
        },
    ),
    "Krea 2": _known(
        "krea_2",
        {
            "blocks.0.attn.wq": ("transformer_blocks.0.attn.to_q",),
            "blocks.0.mlp.down": ("transformer_blocks.0.ff.down",),
            "txtfusion.refiner_blocks.0.attn.wo": ("text_fusion.refiner_blocks.0.attn.to_out.0",),
        },
    ),
    "Lumina 2": _known(
        "lumina_2",
        {
            "layers.0.attention.qkv": _parts("layers.0.attn", *QKV),
            "context_refiner.0.feed_forward.w2": ("context_refiner.0.feed_forward.linear_2",),
        },
    ),
    "SDXL": _known(
        "sdxl",
        {
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q": (
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            ),
            "middle_block.1.proj_in": ("mid_block.attentions.0.proj_in",),
            "output_blocks.4.1.transformer_blocks.0.ff.net.2": (
                "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
            ),
            "input_blocks.7.0.in_layers.2": ("down_blocks.2.resnets.0.conv1",),  # a convolution
        },
    ),
}

#: Spelling → prefix, whether the names are original ones, the separator, and the ends of a pair.
NAMINGS: dict[str, tuple[str, bool, str, tuple[str, str]]] = {
    "diffusers": ("transformer.", False, ".", (".lora_A.weight", ".lora_B.weight")),
    "PEFT": ("base_model.model.", False, ".", (".lora_A.default.weight", ".lora_B.default.weight")),
    "SimpleTuner": ("transformer.base_model.model.", False, ".", (".lora_A.weight", ".lora_B.weight")),
    "LyCORIS": ("lycoris_", False, "_", (".lora_down.weight", ".lora_up.weight")),
    "OneTrainer": ("lora_transformer_", False, "_", (".lora_down.weight", ".lora_up.weight")),
    "ai-toolkit": ("diffusion_model.", True, ".", (".lora_A.weight", ".lora_B.weight")),
    "ComfyUI": ("model.diffusion_model.", True, ".", (".lora_down.weight", ".lora_up.weight")),
    "kohya": ("lora_unet_", True, "_", (".lora_down.weight", ".lora_up.weight")),
    "bare original": ("", True, ".", (".lora.down.weight", ".lora.up.weight")),
}

Draw = Callable[..., Tensor]
Made = tuple[dict[str, Tensor], Tensor]


def _lora(weight: Tensor, draw: Draw, pair: tuple[str, str]) -> Made:
    columns = weight.shape[1:]
    down, up = draw(RANK, *columns), draw(weight.shape[0], RANK)
    delta = (up.double() @ down.double().flatten(1)).view_as(weight)
    file_up = up.reshape(*up.shape, *(1 for _ in columns[1:]))
    tensors = {pair[0]: down, pair[1]: file_up, ".alpha": torch.tensor(ALPHA)}
    return tensors, weight + delta * ALPHA / RANK


def _dora(weight: Tensor, draw: Draw, pair: tuple[str, str]) -> Made:
    tensors, total = _lora(weight, draw, pair)
    norms = total.flatten(1).norm(dim=1)
    magnitude = (norms * (1 + draw(len(norms)).double())).float()
    scale = (magnitude.double() / norms).view(-1, *(1 for _ in weight.shape[1:]))
    return tensors | {".dora_scale": magnitude.view_as(scale)}, total * scale


def _dora_peft(weight: Tensor, draw: Draw, pair: tuple[str, str]) -> Made:
    tensors, changed = _dora(weight, draw, pair)
    tensors[".lora_magnitude_vector"] = tensors.pop(".dora_scale").flatten()
    return tensors, changed


def _loha(weight: Tensor, draw: Draw, _: tuple[str, str]) -> Made:
    rows, columns = weight.flatten(1).shape
    factors = {f".hada_w{n}_{x}": draw(*((rows, RANK) if x == "a" else (RANK, columns))) for n in (1, 2) for x in "ab"}
    first, second = (factors[f".hada_w{n}_a"].double() @ factors[f".hada_w{n}_b"].double() for n in (1, 2))
    delta = (first * second * ALPHA / RANK).view_as(weight)
    return factors | {".alpha": torch.tensor(ALPHA)}, weight + delta


def _lokr(weight: Tensor, draw: Draw, _: tuple[str, str]) -> Made:
    rows, columns, *kernel = weight.shape
    outer, a, b = draw(4, 4), draw(rows // 4, RANK), draw(RANK, columns // 4, *kernel)
    inner = (a.double() @ b.double().flatten(1)).view(rows // 4, columns // 4, *kernel)
    delta = torch.kron(outer.double().view(4, 4, *(1 for _ in kernel)), inner) * ALPHA / RANK
    return {".lokr_w1": outer, ".lokr_w2_a": a, ".lokr_w2_b": b, ".alpha": torch.tensor(ALPHA)}, weight + delta


def _lokr_full(weight: Tensor, draw: Draw, _: tuple[str, str]) -> Made:
    """Two whole matrices: trainers write any alpha beside them, and do not apply it."""
    rows, columns, *kernel = weight.shape
    outer, inner = draw(4, 4), draw(rows // 4, columns // 4, *kernel)
    delta = torch.kron(outer.double().view(4, 4, *(1 for _ in kernel)), inner.double())
    return {".lokr_w1": outer, ".lokr_w2": inner, ".alpha": torch.tensor(1e10)}, weight + delta


def _oft(weight: Tensor, draw: Draw, _: tuple[str, str]) -> Made:
    blocks = draw(weight.shape[0] // BLOCK, BLOCK, BLOCK)
    skew = blocks.double() - blocks.double().transpose(1, 2)
    eye = torch.eye(BLOCK, dtype=torch.float64)
    rotation = torch.block_diag(*((eye + skew) @ torch.linalg.inv(eye - skew)))  # type: ignore[no-untyped-call]
    return {".oft_blocks": blocks, ".alpha": torch.tensor(0.0)}, (rotation.T @ weight.flatten(1)).view_as(weight)


def _oft_peft(weight: Tensor, draw: Draw, _: tuple[str, str]) -> Made:
    flat = weight.flatten(1)
    upper = draw(flat.shape[1] // BLOCK, BLOCK * (BLOCK - 1) // 2)
    skew = torch.zeros(len(upper), BLOCK, BLOCK, dtype=torch.float64)
    rows, columns = torch.triu_indices(BLOCK, BLOCK, 1)
    skew[:, rows, columns] = upper.double()
    skew = skew - skew.transpose(1, 2)
    series = 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew
    rotation = torch.block_diag(*(torch.eye(BLOCK, dtype=torch.float64) + series))  # type: ignore[no-untyped-call]
    return {".oft_R.weight": upper}, (flat @ rotation.T).view_as(weight)


def _difference(weight: Tensor, draw: Draw, _: tuple[str, str]) -> Made:
    difference = draw(*weight.shape)
    return {".diff": difference}, weight + difference.double()


#: Algorithm → a function of a weight: the tensors of a file, and the weight that they make, float64.
ALGORITHMS: dict[str, Callable[[Tensor, Draw, tuple[str, str]], Made]] = {
    "LoRA": _lora,
    "DoRA": _dora,
    "DoRA of PEFT": _dora_peft,
    "LoHa": _loha,
    "LoKr": _lokr,
    "LoKr, whole": _lokr_full,
    "OFT": _oft,
    "OFT of PEFT": _oft_peft,
    "differences": _difference,
}


def save_family(family: Family, folder: Path) -> dict[str, Tensor]:
    """Saves the weights of a model, float32; returns them."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of diffusers about its own classes
        torch.manual_seed(0)
        model = getattr(diffusers, family.model_class)(**family.arguments)
    weights = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return weights


def file_of(
    family: Family, weights: Mapping[str, Tensor], naming: str, algorithm: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a LoRA file, and the weights that it makes, by name, float64."""
    prefix, is_original, separator, pair = NAMINGS[naming]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    tensors: dict[str, Tensor] = {}
    changed: dict[str, Tensor] = {}
    for name, parts in family.layers.items():
        for stem, joined in [(name, parts)] if is_original else [(part, (part,)) for part in parts]:
            weight = torch.cat([weights[f"{part}.weight"].double() for part in joined])
            made, result = ALGORITHMS[algorithm](weight, draw, pair)
            written = prefix + stem.replace(".", separator)
            tensors |= {written + leaf: tensor.contiguous() for leaf, tensor in made.items()}
            sizes = [weights[f"{part}.weight"].shape[0] for part in joined]
            changed |= {f"{part}.weight": rows for part, rows in zip(joined, torch.split(result, sizes), strict=True)}
    return tensors, changed


def error_of(
    family: Family,
    folder: Path,
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
) -> float:
    """The largest difference between what is baked and what is right, over the largest weight.

    Raises:
        CheckpointError: the file is refused.
    """
    path = folder / "lora.safetensors"
    save_file(dict(tensors), path)
    request = LoraRequest(path)
    with Checkpoint.open(folder / "diffusion_pytorch_model.safetensors") as checkpoint:
        view, _ = bake(checkpoint, [request], family.model_class, parts={path: {None}}, force=False)
        errors = [
            (view.read(name).double() - changed.get(name, tensor.double())).abs().max() / (tensor.abs().max() + 1e-30)
            for name, tensor in weights.items()
            if tensor.numel()
        ]
    return float(max(errors))


def _results() -> Iterator[tuple[str, str, str, str]]:
    """Family, naming, algorithm and what became of the file."""
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            weights = save_family(family, Path(folder))
            for naming, algorithm in itertools.product(NAMINGS, ALGORITHMS):
                tensors, changed = file_of(family, weights, naming, algorithm)
                try:
                    error = error_of(family, Path(folder), weights, tensors, changed)
                    yield name, naming, algorithm, "applied" if error < 1e-5 else f"wrong by {error:.1e}"
                except CheckpointError as refusal:
                    yield name, naming, algorithm, str(refusal)


def main() -> None:
    """Prints both tables, and each reason for a refusal once."""
    results = list(_results())
    reasons: dict[str, None] = {}
    for title, columns, index in (("family", list(ALGORITHMS), 2), ("family", list(NAMINGS), 1)):
        print(f"| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        for family in FAMILIES:
            cells = []
            for column in columns:
                found = dict.fromkeys(row[3] for row in results if row[0] == family and row[index] == column)
                reasons |= {reason: None for reason in found if reason != "applied"}
                cells.append("applied" if list(found) == ["applied"] else "refused")
            print(f"| {family} | {' | '.join(cells)} |")
        print()
    for reason in reasons:
        print(f"- {reason}")


if __name__ == "__main__":
    main()
