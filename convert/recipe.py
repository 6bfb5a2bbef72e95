"""The recipe: everything that the user asks for, with one field for each long option of the command line."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omni_convert.convert.budget import BUDGETS, KEPT, BudgetOptions
from omni_convert.formats.containers.component import GGUF_SUFFIX
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.errors import RecipeError, did_you_mean
from omni_convert.formats.options import (
    DIALECT_OF_METHOD,
    DIALECTS_OF_METHOD,
    GGUF_TYPES,
    FormatChoices,
    check_group_size,
    check_memory,
)

__all__ = [
    "METHODS",
    "TRANSCODINGS",
    "LoraRequest",
    "Recipe",
]

# Names alone, since `--help` and a mistyped method must not import torch. A test keeps them equal to `FORMATS`.
METHODS = (
    "fp8",
    "int8",
    "mxfp8",
    "mxfp4",
    "mxfp4_dualscale",
    "nvfp4",
    "w4a16",
    "convrot_w4a4",
    "w4a8",
    "w6a8",
    "nf4",
    "svdquant_int4",
    "svdquant_nvfp4",
    "gguf",
)
# Methods for components beside the transformers, which are stored quantized but run in BF16.
STORAGE_METHODS = ("fp8_storage",)
# Methods that treat a quantized model without quantizing it again.
TRANSCODINGS = ("keep", "dequantize")
#: Types of GGUF among which a budget chooses.
MIXED_GGUF_TYPES = ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ACTIVATION_SCHEMES = ("dynamic", "static")
RUNTIMES = ("vllm-omni", "diffusers", "comfyui")
ROUNDINGS = ("nearest", "gptq", "auto")
LORA_COMPONENT = re.compile(r"([A-Za-z]\w*)=")
ENGINE = re.compile(r"local|ray|(ray://)?[\w.-]+:\d+|ray://[\w.-]+")
# Endings of a component's file, which no method has.
WEIGHTS_FILES = (".safetensors", GGUF_SUFFIX)
DTYPES = ("bfloat16", "float16", "float32")


def _check_choice(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise RecipeError(
            f"--{option}: found '{value}', expected one of {', '.join(choices)}{did_you_mean(value, choices)}"
        )


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA file to bake in.

    Attributes:
        scale: strength relative to the file's own (alpha / rank)
        component: the component to bake it into; None for the only denoiser
    """

    path: Path
    scale: float = 1.0
    component: str | None = None

    @classmethod
    def parse(cls, text: str) -> LoraRequest:
        """Parses `[COMPONENT=]FILE[:SCALE]`; a number after the last colon is the scale.

        Raises:
            RecipeError: the scale is not a finite number.
        """
        component = LORA_COMPONENT.match(text)
        rest = text[component.end() :] if component else text
        file, colon, last = rest.rpartition(":")
        try:
            scale = float(last) if colon else 1.0
        except ValueError:
            file, scale = rest, 1.0
        if not math.isfinite(scale):
            raise RecipeError(f"--lora {text}: found scale {scale}, expected a finite number")
        return cls(Path(file if colon else rest), scale, component[1] if component else None)


@dataclass(frozen=True)
class Recipe(BudgetOptions, FormatChoices):
    """A conversion as the user asks for it; `convert.plan` decides what it means for a given checkpoint.

    Attributes:
        component: component to its method, or to a file with the weights that it gets in place of its own
        runtime: whose layer scope to obey; left empty, it becomes that of the dialect
        config: file or repo id of the config of a model that is a single file

    Raises:
        RecipeError: no checkpoint could be converted with these options.
    """

    method: str = "fp8"
    activation_scheme: str | None = None
    ignored_layers: tuple[str, ...] = ()
    component: dict[str, str] = field(default_factory=dict)
    recommended: bool = False
    runtime: str = ""
    dialect: str = "vllm-omni"
    rounding: str | None = None
    bf16_blocks: int | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"
    lora: tuple[LoraRequest, ...] = ()
    config: str | None = None

    calib: Path | None = None
    calibration: tuple[Path, ...] = ()
    moments: tuple[Path, ...] = ()
    imatrix: Path | None = None
    calib_steps: int | None = None
    calib_size: tuple[int, int] | None = None
    calib_frames: int | None = None
    calib_prompts: int | None = None
    seed: int = 0

    device: str = "auto"
    memory: str = "auto"
    engine: str = "local"
    revision: str | None = None
    workers: int | None = None
    resume: bool = False
    overwrite: bool = False
    verify_source: bool = False
    keep_source: bool = False
    push_to_hub: str | None = None
    private: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        _check_choice("method", self.method, (*METHODS, *TRANSCODINGS))
        _check_choice("dialect", self.dialect, WRITTEN)
        self.check_budget()
        if self.formats:
            self._settle_formats()
        if self.dialect == "vllm-omni":
            self._settle_dialect()
        _check_choice("activation-scheme", self.activation_scheme, ACTIVATION_SCHEMES)
        _check_choice("runtime", self.runtime or None, RUNTIMES)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_choice("dtype", self.dtype, DTYPES)
        for name, method in self.component_methods.items():
            _check_choice(f"component {name}", method, ("none", *METHODS, *STORAGE_METHODS))
        self._check_component_files()
        self._check_input_scale()
        self._check_format_choices()
        if self.bf16_blocks is not None and self.bf16_blocks < 0:
            raise RecipeError(f"--bf16-blocks: found {self.bf16_blocks}, expected 0 or more")
        if not ENGINE.fullmatch(self.engine):
            raise RecipeError(f"--engine: found '{self.engine}', expected local, ray, ray://HOST:PORT or HOST:PORT")
        check_memory(self.memory, "--memory")
        if self.private and self.push_to_hub is None:
            raise RecipeError("--private: found without --push-to-hub REPO_ID, which it refines")
        if self.workers is not None and self.workers < 1:
            raise RecipeError(f"--workers: found {self.workers}, expected at least 1")
        if self.calib is not None and self.calibration:
            raise RecipeError("--calib and --calibration: found both, expected one; --calibration reuses a --calib run")
        self._check_lora()
        if self.budget is not None or self.formats:
            self._check_mixture()
        self._settle_runtime()  # which imports torch, so that other mistakes are told at once
        self._check_formats()

    def _settle_dialect(self) -> None:
        """Takes the one dialect that holds the method, where the default does not; refuses to guess among several."""
        if self.method in DIALECTS_OF_METHOD:
            raise RecipeError(
                f"--method {self.method}: found with --dialect vllm-omni, whose reader does not take it, expected "
                f"--dialect {' or '.join(DIALECTS_OF_METHOD[self.method])}"
            )
        object.__setattr__(self, "dialect", DIALECT_OF_METHOD.get(self.method, self.dialect))

    def _settle_formats(self) -> None:
        """Checks the formats to choose from; the method becomes one of them."""
        kinds = tuple(name for name in self.formats if name != KEPT)
        if self.method == "gguf":
            for name in kinds:
                _check_choice("formats", name, GGUF_TYPES)
            return
        for name in kinds:
            _check_choice("formats", name, tuple(method for method in METHODS if method != "gguf"))
        if not kinds:
            raise RecipeError(f"--formats: found {KEPT} alone, expected a format to quantize to")
        if self.method not in kinds:
            if self.method != Recipe.method:
                raise RecipeError(f"--formats: found {', '.join(kinds)} with method '{self.method}', expected it there")
            object.__setattr__(self, "method", kinds[0])

    @property
    def mixed_formats(self) -> tuple[str, ...]:
        """The formats among which a budget chooses: those asked for, or those that the dialect mixes."""
        if self.formats:
            return self.formats
        if self.method == "gguf":
            return MIXED_GGUF_TYPES
        usual = DIALECTS[self.dialect].mixed_methods
        return (*(usual if self.method in usual else (self.method,)), KEPT)

    def _check_mixture(self) -> None:
        """Settles the dialect of a mixture, and refuses one that the dialect cannot hold."""
        kinds = [name for name in self.mixed_formats if name != KEPT]
        if self.method == "gguf" or len(kinds) < 2:
            return
        dialect = DIALECTS[self.dialect]
        unheld = next((name for name in kinds if name not in dialect.mixed_methods), None)
        if unheld is not None:
            usual = f"of {', '.join(dialect.mixed_methods)}" if dialect.mixed_methods else f"such as {unheld},{KEPT}"
            raise RecipeError(
                f"--formats: found {unheld} beside others with --dialect {self.dialect}, expected a mixture {usual}"
            )
        if self.dialect == "vllm-omni":
            object.__setattr__(self, "dialect", "modelopt")  # in which vLLM-Omni reads mixtures

    def _settle_runtime(self) -> None:
        runtimes = DIALECTS[self.dialect].runtimes
        if not self.runtime:
            object.__setattr__(self, "runtime", runtimes[0])
        elif self.runtime not in runtimes:
            raise RecipeError(
                f"--runtime {self.runtime}: found with --dialect {self.dialect}, expected {' or '.join(runtimes)}"
            )

    def _check_lora(self) -> None:
        if self.lora and (self.is_calibrated or self.moments):
            raise RecipeError(
                "--lora: found with calibration, which would run the model without it, expected it alone; bake it "
                "first with -m keep --lora, and calibrate on the result"
            )

    def _check_component_files(self) -> None:
        for name, path in self.component_files.items():
            option = f"--component {name}={path}"
            if not path.exists():
                raise RecipeError(f"{option}: found no such file, expected weights for the component")
            if self.calib is not None:
                raise RecipeError(
                    f"{option}: found with --calib, which would run the model without it, expected it alone; assemble "
                    "the pipeline first with `omni-convert dequantize MODEL --component ...`, and calibrate on that"
                )

    def _check_formats(self) -> None:
        """Refuses a dialect or runtime that a format of the recipe does not have."""
        from omni_convert.formats.table import FORMATS  # torch

        is_default, is_for_us = self.dialect == "vllm-omni", self.runtime == "diffusers"
        dialect, runtime = f"--dialect {self.dialect}", f"--runtime {self.runtime}"
        for name, method in {"": self.method, **self.component_methods}.items():
            if method not in FORMATS:
                continue
            if FORMATS[method].is_container and not is_default:
                raise RecipeError(f"{dialect}: found with method '{method}', which is a kind of file by itself")
            if FORMATS[method].is_storage and not (is_default and is_for_us):
                raise RecipeError(
                    f"--component {name}={method}: found with {dialect if is_for_us else runtime}, expected --runtime "
                    "diffusers and the default dialect: our loader alone reads it"
                )

    def _check_format_choices(self) -> None:
        check_group_size(self.group_size, "--group-size")
        if self.weight_block_size is not None and min(self.weight_block_size) < 1:
            rows, columns = self.weight_block_size
            raise RecipeError(f"--weight-block-size: found {rows},{columns}, expected two positive sizes")
        if self.imatrix is not None:
            self._check_is_honoured("imatrix", "imatrix")
            if self.is_calibrated:
                raise RecipeError(
                    "--imatrix: found with --calib or --calibration, expected one: both weight the errors"
                )
        for choice in fields(FormatChoices):
            value, option = getattr(self, choice.name), choice.name.replace("_", "-")
            if choice.metadata["choices"]:
                _check_choice(option, value, choice.metadata["choices"])
            if value != choice.default:
                self._check_is_honoured(choice.name, option)
            dialects = choice.metadata["dialects"].get(value, (self.dialect,))
            if self.dialect not in dialects:
                given = option if value is True else f"{option} {value}"
                raise RecipeError(
                    f"--{given}: found with --dialect {self.dialect}, expected --dialect "
                    f"{' or '.join(dialects)}: no other dialect has it"
                )

    def _check_is_honoured(self, name: str, option: str) -> None:
        """Refuses a choice that no method of the recipe has: ignored, it would promise what the file does not hold."""
        from omni_convert.formats.table import FORMATS  # torch

        honouring = [method for method, kind in FORMATS.items() if name in kind.options]
        if honouring and {self.method, *self.component_methods.values()}.isdisjoint(honouring):
            raise RecipeError(
                f"--{option}: found with method '{self.method}', which has no such choice, expected method "
                f"{' or '.join(honouring)}"
            )

    def _check_input_scale(self) -> None:
        rule, _, argument = self.input_scale.partition(":")
        if self.input_scale in ("max", "mse"):
            return
        try:
            if rule == "percentile" and 0 < float(argument) <= 100:
                return
        except ValueError:
            pass
        raise RecipeError(
            f"--input-scale: found '{self.input_scale}', expected max, mse or percentile:P with 0 < P <= 100"
        )

    @property
    def component_methods(self) -> dict[str, str]:
        """Component to its own method, where it has one."""
        return {name: value for name, value in self.component.items() if name not in self.component_files}

    @property
    def component_files(self) -> dict[str, Path]:
        """Component to the file, or the folder, with the weights that it gets in place of its own."""
        methods = ("none", *METHODS, *STORAGE_METHODS)
        others = {name: value for name, value in self.component.items() if value not in methods}
        return {
            name: Path(value) for name, value in others.items() if value.endswith(WEIGHTS_FILES) or Path(value).is_dir()
        }

    @property
    def format_choices(self) -> dict[str, Any]:
        """The fields that are `FormatChoices`."""
        return {choice.name: getattr(self, choice.name) for choice in fields(FormatChoices)}

    @property
    def outcome(self) -> str:
        """The suffix of the result's name, after the model's name."""
        if self.method == "keep" and self.lora:
            return "baked"
        if self.budget is not None:
            return "mixed"
        return {"keep": self.dialect, "dequantize": "dequantized"}.get(self.method, self.method)

    @property
    def is_transcoding(self) -> bool:
        """Whether a quantized model is only re-encoded or dequantized."""
        return self.method in TRANSCODINGS

    @property
    def is_calibrated(self) -> bool:
        """Whether the conversion has activation statistics, from files or recorded by itself."""
        return self.calib is not None or bool(self.calibration)

    @property
    def is_distributed(self) -> bool:
        """Whether a cluster does the work."""
        return self.engine != "local"

    @property
    def streams_source(self) -> bool:
        """Whether a model on the Hub can be streamed, so that the disk never holds all of it.

        Running a pipeline needs all files, statistics are compared with every tensor before anything is written, and
        the machines of a cluster share files but not downloads.
        """
        needs_all = self.is_calibrated or self.moments or self.is_distributed
        return not self.keep_source and not needs_all

    @property
    def effective_rounding(self) -> str:
        """How weights are rounded; `auto` is nearest rounding where nothing is known of the layers' inputs."""
        if self.moments or self.is_calibrated:
            return self.rounding or "auto"
        return "gptq" if self.rounding == "gptq" else "nearest"

    @property
    def _named_rounding(self) -> str | None:
        """The rounding in the manifest; None for the default with statistics, and for nearest rounding without."""
        if self.effective_rounding == "nearest":
            return "nearest" if self.is_calibrated else None
        return self.rounding or ("auto" if self.moments else None)

    @property
    def _names_of_files(self) -> dict[str, str]:
        return {name: path.name for name, path in self.component_files.items()}

    def of_the_bytes(self) -> dict[str, Any]:
        """The options on which the output's bytes depend, for the manifest; paths and devices are not among them."""
        options = {
            "method": self.method,
            "activation_scheme": self.activation_scheme,
            "input_scale": self.input_scale,
            "weight_block_size": list(self.weight_block_size) if self.weight_block_size else None,
            "ignored_layers": sorted(self.ignored_layers),
            "component": dict(sorted((self.component_methods | self._names_of_files).items())),
            "recommended": self.recommended,
            "runtime": "" if self.runtime == RUNTIMES[0] else self.runtime,  # manifests that name none mean this one
            "dialect": self.dialect,
            "int8_fused_scales": self.int8_fused_scales,
            "scale_rule": self.scale_rule,
            "group_size": self.group_size,
            "gguf_type": self.gguf_type,
            "gguf_names": self.gguf_names,
            "search": self.search,
            "rounding": self._named_rounding,
            "bf16_blocks": self.bf16_blocks,
            "imatrix": None if self.imatrix is None else hashlib.sha256(self.imatrix.read_bytes()).hexdigest(),
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
            **{name: getattr(self, name) for name in BUDGETS},
            "trial": None if self.trial is None else hashlib.sha256(self.trial.read_bytes()).hexdigest(),
            "formats": list(self.formats),
        }
        options = {**options, **self.format_choices, "weight_block_size": options["weight_block_size"]}
        defaults = {name: Recipe.__dataclass_fields__[name].default for name in options}
        chosen = {
            name: value for name, value in options.items() if name == "method" or value not in (defaults[name], [], {})
        }
        return chosen if self.imatrix is None else {**chosen, "imatrix_file": self.imatrix.name}  # a key of GGUF
