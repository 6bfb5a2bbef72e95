"""A checkpoint becomes a running pipeline. Importing this registers our quantizers with diffusers and transformers."""

from omni_convert.loaders import lora
from omni_convert.loaders.attention import diffusers_backends
from omni_convert.loaders.attention.enable import disable_fp8_attention, enable_fp8_attention
from omni_convert.loaders.layers.fp8_storage import apply_fp8_weight_storage
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear, quantize_linear
from omni_convert.loaders.loading import diffusers_quantizer, transformers_quantizer
from omni_convert.loaders.pipeline import load_pipeline
from omni_convert.loaders.report import KernelReport, LayerReport, kernel_report
from omni_convert.loaders.request.spec import (
    ComponentQuantizationConfig,
    build_quant_config,
    resolve_component_quant_config,
)
from omni_convert.loaders.step_cache import disable_step_cache, enable_step_cache

__all__ = [
    "ComponentQuantizationConfig",
    "KernelReport",
    "LayerReport",
    "QuantizedLinear",
    "apply_fp8_weight_storage",
    "build_quant_config",
    "disable_fp8_attention",
    "disable_step_cache",
    "enable_fp8_attention",
    "enable_step_cache",
    "kernel_report",
    "load_pipeline",
    "quantize_linear",
    "resolve_component_quant_config",
]

diffusers_backends.register()
diffusers_quantizer.register()
transformers_quantizer.register()
lora.register()
