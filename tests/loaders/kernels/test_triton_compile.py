"""Every Triton kernel compiles for every architecture that may run it, and the machine code is what it should be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")

# Reads the machine code of kernels: registers spilled to memory, and instructions for each element of a tile.
READ = """
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
POINTERS = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "unit_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
TARGETS = (80, 89, 90, 100)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB of a block

def build(kernel, capability, types, constants, **options):
    types = {**dict.fromkeys(kernel.arg_names, "i32"), **POINTERS, **types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t != "constexpr"}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert binary.metadata.shared <= SHARED[capability] * 1024, (kernel, capability, binary.metadata.shared)
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = read("cuobjdump", "--dump-resource-usage", file.name)
        code = read("nvdisasm", "-c", file.name)
    spilled = int(re.search(r"LOCAL:(\\d+)", usage)[1]) + int(re.search(r"STACK:(\\d+)", usage)[1])
    instructions = re.findall(r"/\\*[0-9a-f]{4,5}\\*/\\s+(?:@!?U?P\\d+ )?([A-Z0-9]+)", code)
    return binary.asm["ptx"], instructions, spilled

def read(tool, *arguments):
    return subprocess.run([os.path.join(TOOLS, tool), *arguments], capture_output=True, text=True, check=True).stdout
"""

# At 3 bytes an element and 18 instructions, an H200 issues as fast as it reads and writes; counted without slow paths
# it is fewer.
ACTIVATIONS = """
from omni_convert.loaders.kernels.triton.activation import fp8_kernel, int8_kernel, static_kernel
from omni_convert.loaders.kernels.triton.block_activation import TILE, group_kernel, mxfp8_kernel, nvfp4_kernel

e4m3 = {"LARGEST": 448.0}
tile = {**e4m3, "ROWS": TILE[0], "COLUMNS": TILE[1]}
kernels = (
    (fp8_kernel, {**e4m3, "SMALLEST_SCALE": 1e-6, "BLOCK": 4096}, 18),
    (static_kernel, {**e4m3, "BLOCK": 4096}, 10),
    (group_kernel, {**tile, "GROUP": 128, "SMALLEST_AMAX": 1e-10}, 18),
    (mxfp8_kernel, {**tile, "BLOCK": 32}, 12),
    (nvfp4_kernel, {**tile, "BLOCK": 16}, 40),
    (int8_kernel, {"LARGEST": 127.0, "SMALLEST": 1e-37, "BLOCK": 4096}, 18),
)
for capability in TARGETS:
    has_e4m3 = capability >= 89
    for kernel, constants, most in kernels:
        types = {"codes_ptr": "*fp8e4nv" if has_e4m3 else "*u8", "unit_ptr": "*fp32"}
        if kernel is int8_kernel:
            types["codes_ptr"] = "*i8"
        else:
            constants = {**constants, "HAS_E4M3": has_e4m3}
        if kernel in (mxfp8_kernel, nvfp4_kernel):
            types["scale_ptr"] = "*u8"
        if kernel is nvfp4_kernel:
            types["codes_ptr"], constants["HAS_E2M1"] = "*u8", capability >= 100
        ptx, instructions, spilled = build(kernel, capability, types, constants, num_warps=4, enable_fp_fusion=False)
        where = (kernel, capability, len(instructions) / 32)
        assert spilled == 0, where
        assert "ld.global.v4" in ptx and "st.global.v" in ptx and "div.full" not in ptx and ".ftz" not in ptx, where
        assert not has_e4m3 or len(instructions) <= 32 * most, where
"""

# Every format on the largest tile, and every other tile on one format.
DECODING = """
from omni_convert.loaders.kernels.triton.matmul import LONGEST_STEP, TILES, choose_tile, decode_mm_kernel

absent = dict.fromkeys(("scale_ptr", "group_ptr", "zero_ptr", "unit_ptr"))
formats = {  # the code, the types of what else there is, the group
    "fp8": ("e4m3", {"unit_ptr": "*fp32"}, (1, 0)),
    "fp8 block": ("e4m3", {"group_ptr": "*fp32"}, (128, 128)),
    "int8": ("int8", {"unit_ptr": "*fp32"}, (1, 0)),
    "mxfp8": ("e4m3", {"scale_ptr": "*u8"}, (1, 0)),
    "mxfp4": ("e2m1", {"scale_ptr": "*u8"}, (1, 0)),
    "mxfp4_dualscale": ("e2m1", {"scale_ptr": "*u8", "group_ptr": "*fp32"}, (1, 512)),
    "nvfp4": ("e2m1", {"scale_ptr": "*u8", "unit_ptr": "*fp32"}, (1, 0)),
    "w4a16": ("int4", {"group_ptr": "*fp16", "zero_ptr": "*i32"}, (1, 128)),
}
weights = {"e2m1": "*u8", "e4m3": "*u8", "int8": "*i8", "int4": "*i32"}
for capability in TARGETS:
    for name, rows in [(name, 4096) for name in formats] + [("mxfp4", most) for most, _ in TILES[:-1]]:
        code, types, group = formats[name]
        tile = choose_tile(rows, group[1])
        constants = {pointer: None for pointer in absent if pointer not in types}
        constants |= {"CODE": code, "BLOCK": 16 if name == "nvfp4" else 32, "GROUP_ROWS": group[0], "GROUP": group[1]}
        constants |= {"ROWS": tile.rows, "OUTPUTS": tile.outputs, "STEP": tile.step, "MULTIPLE": LONGEST_STEP}
        constants |= {"IN_CACHE": 8, "IS_INTERPRETED": False, "group_stride": 1}
        types = {"weight_ptr": weights[code], **types}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        ptx, _, spilled = build(decode_mm_kernel, capability, types, constants, **options)
        assert "mma" in ptx and spilled == 0, (name, tile, capability, spilled)
"""


def run(script: str, cache: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ + script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_activations_compile_into_wide_accesses_and_few_instructions_without_spills(tmp_path):
    run(ACTIVATIONS, tmp_path)


@pytest.mark.slow
def test_weights_of_every_format_decode_into_tensor_core_instructions_without_spills(tmp_path):
    run(DECODING, tmp_path)
