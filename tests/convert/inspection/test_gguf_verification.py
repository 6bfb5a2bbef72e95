"""Files of GGUF that are broken on purpose, and good ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from omni_convert.convert.cli.main import main
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import Source, resolve_source
from omni_convert.formats.finding import Finding

LAYER = "transformer_blocks.0.attn.to_q.weight"


@dataclass
class Model:
    """The contents of a GGUF file that is to be written."""

    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]
    architecture: str | None = "flux"
    tail: int = 0
    cut: int = 0
    patches: list[tuple[bytes, bytes]] = field(default_factory=list)

    def write(self, folder: Path, config: Path | None) -> Path:
        folder.mkdir()
        path = folder / "model.gguf"
        writer = gguf.GGUFWriter(path, self.architecture or "x")
        if self.architecture is None:
            del writer.kv_data[0]["general.architecture"]
        for name, (data, kind) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = path.read_bytes()
        for old, new in self.patches:
            assert content.count(old)
            content = content.replace(old, new, 1)
        path.write_bytes(content[: len(content) - self.cut] + bytes(self.tail))
        if config is not None:
            (folder / "config.json").write_bytes((config / "config.json").read_bytes())
        return folder


def model_of(flux_folder: Path, kind: str = "Q8_0") -> Model:
    from safetensors.torch import load_file

    number = gguf.GGMLQuantizationType[kind]
    tensors: dict[str, Any] = {}
    for name, weight in load_file(flux_folder / "diffusion_pytorch_model.safetensors").items():
        is_block = weight.dim() == 2 and weight.shape[1] % 32 == 0 and "blocks" in name
        chosen = number if is_block else gguf.GGMLQuantizationType.F32
        tensors[name] = (gguf.quants.quantize(weight.float().numpy(), chosen), chosen)
    return Model(tensors)


def change(name: str, edit: Callable[[np.ndarray], None]) -> Callable[[Model], None]:
    def damage(model: Model) -> None:
        data, kind = model.tensors[name]
        data = data.copy()
        edit(data)
        model.tensors[name] = (data, kind)

    return damage


def put(position: int, values: tuple[int, ...]) -> Callable[[np.ndarray], None]:
    def edit(data: np.ndarray) -> None:
        data.reshape(-1)[position : position + len(values)] = values

    return edit


def halve(model: Model) -> None:
    data, kind = model.tensors[LAYER]
    model.tensors[LAYER] = (data[:32], kind)


def rename(old: str, new: str) -> Callable[[Model], None]:
    def damage(model: Model) -> None:
        model.tensors[new] = model.tensors.pop(old)

    return damage


def scaled(model: Model) -> None:
    data, kind = model.tensors[LAYER]
    weight = gguf.quants.dequantize(data, kind) * 2e5
    model.tensors[LAYER] = (gguf.quants.quantize(weight, kind), kind)


def assign(**fields: Any) -> Callable[[Model], None]:
    def damage(model: Model) -> None:
        for name, value in fields.items():
            setattr(model, name, value)

    return damage


def patch(old: bytes, new: bytes) -> Callable[[Model], None]:
    return lambda model: model.patches.append((old, new))


MXFP4, Q8_0 = "MXFP4", "Q8_0"
NORM = "transformer_blocks.0.attn.norm_q.weight"
BIAS = "transformer_blocks.0.attn.to_q.bias"
NAN = (0x00, 0x7E)  # an FP16 that is NaN
TYPE = LAYER.encode() + b"\x02\0\0\0" + (64).to_bytes(8, "little") * 2
#: Type, what is done to the file, what is found, and where.
BROKEN: dict[str, tuple[str, Callable[[Model], None], str, str]] = {
    "NaN scale": (Q8_0, change(LAYER, put(0, NAN)), "non-finite", LAYER),
    "infinite minimum": ("Q4_1", change(LAYER, put(2, (0x00, 0x7C))), "non-finite", LAYER),
    "NaN in a plain tensor": (Q8_0, change(BIAS, put(3, (float("nan"),))), "non-finite", BIAS),  # type: ignore[arg-type]
    "E8M0 255": (MXFP4, change(LAYER, put(17, (255,))), "e8m0-nan", LAYER),
    "sizes of no model": (Q8_0, scaled, "implausible-scale", "transformer_blocks.0.attn.to_q"),
    "width": (Q8_0, patch(TYPE, TYPE[:-16] + (33).to_bytes(8, "little") + TYPE[-8:]), "damaged-file", ""),
    "unknown type": (
        Q8_0, patch(TYPE + b"\x08\0\0\0", TYPE + b"\xc8\0\0\0"), "damaged-file", "",
    ),
    "type that is not dequantized": (
        Q8_0, patch(TYPE + b"\x08\0\0\0", TYPE + b"\x09\0\0\0"), "damaged-file", "",
    ),
    "truncated": (Q8_0, assign(cut=100), "damaged-file", ""),
    "a tail": (Q8_0, assign(tail=4096), "unused-bytes", ""),
    "no architecture": (Q8_0, assign(architecture=None), "no-architecture", ""),
    "an architecture that tells nothing": (Q8_0, assign(architecture="pig"), "no-architecture", ""),
    "another architecture": (Q8_0, assign(architecture="wan"), "wrong-architecture", ""),
    "blocks of a vector": (Q8_0, lambda model: _blocks_of_vector(model), "wrong-type", NORM),
    "name that nobody knows": (Q8_0, rename(LAYER, "attention.weight"), "unknown-names", ""),
    "missing tensor": (Q8_0, lambda model: model.tensors.pop(LAYER) and None, "unknown-names", ""),
    "rows missing": (Q8_0, halve, "wrong-shape", LAYER),
    "long name": (Q8_0, rename(LAYER, "a" * 130 + ".weight"), "long-name", "aaa"),
}  # fmt: skip


def _blocks_of_vector(model: Model) -> None:
    data, _ = model.tensors[NORM]
    model.tensors[NORM] = (gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)


def findings_of(folder: Path, reference: Path | None = None) -> tuple[Finding, ...]:
    (component,) = verify_source(Source(folder, "model"), resolve_source(reference) if reference is not None else None)
    return component.findings


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_found(name: str, flux_folder: Path, tmp_path: Path) -> None:
    kind, damage, check, layer = BROKEN[name]
    model = model_of(flux_folder, kind)
    damage(model)
    findings = findings_of(model.write(tmp_path / "model", flux_folder))
    assert any(found.check == check and layer in found.layer for found in findings), findings
    assert not any("\n" in found.what for found in findings)


@pytest.mark.parametrize("architecture", ["pig", "cow", None])
def test_a_guessed_architecture_is_no_error(architecture: str | None, flux_folder: Path, tmp_path: Path) -> None:
    model = model_of(flux_folder)
    model.architecture = architecture
    (found,) = findings_of(model.write(tmp_path / "model", flux_folder))
    assert (found.severity, found.check) == ("warning", "no-architecture")


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "MXFP4", "BF16", "TQ1_0"])
def test_good_files_are_not_flagged(kind: str, flux_folder: Path, tmp_path: Path) -> None:
    if kind == "TQ1_0":  # blocks of 256, in no model so small
        rows = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
        number = gguf.GGMLQuantizationType.TQ1_0
        model = Model({"blocks.0.weight": (gguf.quants.quantize(rows, number), number)})
        assert findings_of(model.write(tmp_path / "model", None)) == ()
        return
    folder = model_of(flux_folder, kind).write(tmp_path / "model", flux_folder)
    assert findings_of(folder) == ()
    assert findings_of(folder, flux_folder) == ()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q3_K", "Q5_K", "IQ4_XS"])
def test_what_we_write_is_right_and_near_what_it_was_made_of(kind: str, flux_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(flux_folder, tmp_path / "out", Recipe("gguf", gguf_type=kind, device="cpu"))
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--reference", str(flux_folder)])
    assert result.exit_code == 0, result.output
    assert "0 errors, 0 warnings" in result.output


def test_weights_of_another_model_are_told_by_a_reference(flux_folder: Path, tmp_path: Path) -> None:
    model = model_of(flux_folder)
    data, kind = model.tensors[LAYER]
    model.tensors[LAYER] = (data[::-1].copy(), kind)
    folder = model.write(tmp_path / "model", flux_folder)
    assert findings_of(folder) == ()
    (found,) = findings_of(folder, flux_folder)
    assert (found.check, found.layer) == ("differs-from-reference", LAYER.removesuffix(".weight"))


def test_a_file_is_inspected_dequantized_and_quantized_anew(flux_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = model_of(flux_folder, "Q5_1").write(tmp_path / "model", flux_folder)
    file = str(folder / "model.gguf")
    result = CliRunner().invoke(main, ["inspect", file])
    assert "spelled as gguf does" in result.output
    assert "ComfyUI-GGUF: refuses" in result.output
    convert_checkpoint(file, tmp_path / "plain", Recipe("dequantize", device="cpu"))
    weights = load_file(tmp_path / "plain" / "diffusion_pytorch_model.safetensors")
    original = load_file(flux_folder / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == original.keys()
    data, kind = model_of(flux_folder, "Q5_1").tensors[LAYER]
    assert weights[LAYER].equal(torch.from_numpy(gguf.quants.dequantize(data, kind)).bfloat16())
    report = convert_checkpoint(file, tmp_path / "fp8", Recipe("int8", runtime="diffusers", device="cpu"))
    assert any("dequantized in float32 and quantized again" in note for note in report.notes)
    result = CliRunner().invoke(main, [file, "-m", "keep", "-o", str(tmp_path / "kept")])
    assert result.exit_code == 1
    assert "copy the file to keep it" in result.stderr
