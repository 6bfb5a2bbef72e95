"""The code of vLLM-Omni on a machine without a GPU: its configs, model classes, linear methods and weight loaders.

What runs on a device only is left out: the kernels, and what the linear methods do with loaded weights for them. Where
none of their kernels is for this machine, another of theirs takes the place, and is not run either.

Runs in an environment that has vLLM and vLLM-Omni, as scripts/nightly makes them.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.views.opened import QuantizedLayer

__all__ = [
    "HIDREAM_O1",
    "STAGES",
    "Comparison",
    "ModelPlace",
    "Place",
    "Runtime",
    "StagePlace",
    "compare",
    "declare_operators",
    "installed_version",
]

MODELS = "vllm_omni.diffusion.models"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: The bound of an error between numbers that differ by the order of multiplications alone.
ROUNDING = 2**-20


def installed_version() -> str:
    """The version of vLLM-Omni that is installed."""
    return version("vllm-omni")


@dataclass(frozen=True)
class ModelPlace:
    """Where vLLM-Omni has the class of a diffusion model: `module:name`, below `vllm_omni.diffusion.models`.

    Attributes:
        pipeline: the pipeline's class in diffusers; "" for a repository without model_index.json
        builder: the function that builds it from a config and a quantization config, as their pipeline does; "" where
            the pipeline calls the class
        renaming: the function by which their pipeline renames tensors of a checkpoint; "" if it does not
        build: a function of their config that builds it, where that takes more
        component: the folder of its weights; "" for the repository itself
        child: the model's name in their pipeline
        prefix: what their pipeline puts before names of the file
        own: what the names of the tensors that the model reads begin with, in the file
    """

    model: str
    pipeline: str = ""
    builder: str = ""
    renaming: str = ""
    build: Callable[[Any], nn.Module] | None = None
    component: str = "transformer"
    child: str = "transformer"
    prefix: str = "transformer."
    own: tuple[str, ...] = ("",)
    other_folder: str = ""

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.model.partition(":")[2]

    @property
    def runtime_prefix(self) -> str:
        """What our tables may have before the names of the class's own modules."""
        return f"{self.component}."

    def exists(self) -> bool:
        """Whether this version of vLLM-Omni has the class."""
        return find_spec(f"{MODELS}.{self.model.partition('.')[0]}") is not None

    def imported(self) -> type[nn.Module]:
        """The class, where it exists."""
        found: type[nn.Module] = _imported(self.model)
        return found

    def renamed(self, name: str) -> str | None:
        """The name under which their pipeline loads a tensor of the checkpoint; None if it drops it.

        Their ModelOpt adapter asks the pipeline for it, as `remap_checkpoint_key`.
        """
        return _function(self.renaming)(name) if self.renaming else name

    def reads(self, name: str) -> bool:
        """Whether the model reads a tensor of the file."""
        return name.startswith(self.own) and self.renamed(name) is not None


@dataclass(frozen=True)
class StagePlace:
    """Where vLLM-Omni has the language model of an autoregressive stage.

    Attributes:
        model: its class, `module:name`; "" if the outer class has its layers
        architecture: the class of the stages together, which their config names
        outer: the class whose names of tensors and merged layers the quantization config takes over, `module:name`
        stage: the stage's name there
        config_key: the key of the stage's config
        architectures: those with which the outer class asks for the language model
        prefix: what stands before the stage's names in the file
        module_prefix: what stands before the names of the language model's modules in their configs
        own: what the names of the tensors that the language model reads begin with, in the file
        other_folder: a folder of which the class reads further weights
    """

    model: str
    architecture: str
    outer: str
    stage: str
    config_key: str
    architectures: tuple[str, ...]
    prefix: str
    module_prefix: str
    own: tuple[str, ...]
    other_folder: str = ""
    component: str = ""

    @property
    def name(self) -> str:
        """The name of the class that has it."""
        return self.outer.partition(":")[2]

    @property
    def runtime_prefix(self) -> str:
        """What stands before the names of the class's own modules in our tables."""
        return self.prefix

    def exists(self) -> bool:
        """Whether this version has the class."""
        return find_spec(self.outer.partition(":")[0]) is not None

    def renamed(self, name: str) -> str:
        """The name by which the language model's own loader knows a tensor."""
        return name.removeprefix(self.prefix)

    def reads(self, name: str) -> bool:
        """Whether the language model reads a tensor of the file."""
        return name.startswith(self.own)


Place = ModelPlace | StagePlace


@cache
def _imported(place: str) -> Any:
    """Something of theirs: `module:name`. The module's package is left out where it wants what is not installed."""
    module, _, name = place.partition(":")
    package = f"{MODELS}.{module.partition('.')[0]}"
    try:
        import_module(package)
    except ModuleNotFoundError:
        spec = find_spec(package)
        assert spec is not None
        sys.modules[package] = module_from_spec(spec)  # without running its imports
    return getattr(import_module(f"{MODELS}.{module}"), name)


@cache
def _function(place: str) -> Any:
    """A function of theirs that needs nothing of its module, `module:name`, alone from the module's text."""
    module, _, name = place.partition(":")
    package, _, file = module.partition(".")
    spec = find_spec(f"{MODELS}.{package}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    text = Path(spec.submodule_search_locations[0], f"{file}.py").read_text()
    found = next(each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.FunctionDef) and each.name == name)
    found.decorator_list = []
    scope: dict[str, Any] = {}
    exec(compile(ast.Module([found], []), f"{file}.py", "exec"), scope)
    return scope[name]


class Runtime:
    """Their code in this process, on a platform for this machine, as their plugins add one."""

    def __init__(self, rendezvous: Path) -> None:
        declare_operators()
        self._interface = import_module("vllm_omni.platforms.interface")
        self._platform = self._own_platform()
        for name in ("int8_config", "mxfp8_config", "mxfp4_config"):  # on an NPU they would import its torch
            import_module(f"vllm_omni.quantization.{name}")
        _replace_kernels()
        _inspect_classes_here()
        import_module("vllm_omni.engine.arg_utils").register_omni_models_to_vllm()
        self._settings = import_module("vllm.config")
        self._start_group(rendezvous)

    def _own_platform(self) -> Any:
        class Cpu(self._interface.UnspecifiedOmniPlatform):  # type: ignore[name-defined, misc]
            @classmethod
            def get_diffusion_attn_backend_cls(cls, *_: object, **__: object) -> str:
                return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

            @classmethod
            def get_device_count(cls) -> int:
                return 1

            @classmethod
            def supports_torch_inductor(cls) -> bool:
                return False

            @classmethod
            def set_device(cls, device: torch.device) -> None:
                pass

        import_module("vllm_omni.platforms")._current_omni_platform = Cpu()  # type: ignore[attr-defined]  # noqa: SLF001
        return Cpu

    def _start_group(self, rendezvous: Path) -> None:
        parallel = import_module("vllm_omni.diffusion.distributed.parallel_state")
        with self._settings.set_current_vllm_config(self._settings.VllmConfig()):
            parallel.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            parallel.initialize_model_parallel(backend="gloo")
        groups: Any = import_module("vllm.distributed.parallel_state")
        # Experts, which diffusion models have not always, are in this process alone as well.
        groups._EP = groups._EP or groups.get_tp_group()  # noqa: SLF001
        groups._PCP = groups._PCP or groups.get_tp_group()  # noqa: SLF001

    def load(self, folder: Path, place: Place, device: str) -> nn.Module:
        """Their model, built from our config and filled from our files by their loader, strict as it is.

        Args:
            folder: a pipeline or a repository
            device: name of the device to take this machine for; their configs choose linear methods by it
        """
        self._platform._omni_enum = self._interface.OmniPlatformEnum[device]  # noqa: SLF001
        torch.set_default_dtype(torch.bfloat16)
        try:
            return self._stage(folder, place) if isinstance(place, StagePlace) else self._diffusion_model(folder, place)
        finally:
            torch.set_default_dtype(torch.float32)

    def _diffusion_model(self, folder: Path, place: ModelPlace) -> nn.Module:
        data = import_module("vllm_omni.diffusion.data")
        configs = import_module("vllm_omni.diffusion.vllm_config")
        config = data.OmniDiffusionConfig.from_kwargs(model=str(folder))
        config.enrich_config()
        if not config.quantization_config_is_auto_detected:
            raise ValueError("found no quantization config in the files, expected one")
        base = configs.create_base_diffusion_vllm_config(torch.device("cpu"), config)
        base = configs.configure_diffusion_vllm_config(base, config) or base
        with self._settings.set_current_vllm_config(base):
            return self._filled(config, _built(place, config), place)

    def _filled(self, config: Any, model: nn.Module, place: ModelPlace) -> nn.Module:
        loading = import_module("vllm_omni.diffusion.model_loader.diffusers_loader")
        source = loading.DiffusersPipelineLoader.ComponentSource
        weights_loader = import_module("vllm.model_executor.models.utils").AutoWeightsLoader

        class Pipeline(nn.Module):
            """What concerns the model in a pipeline class of theirs, which skips the rest, or has modules for it."""

            def __init__(self) -> None:
                super().__init__()
                self.weights_sources = [source(config.model, place.component or None, None, place.prefix, True)]
                self.add_module(place.child, model)
                if place.renaming:
                    self.remap_checkpoint_key = place.renamed

            def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
                own = {*self.state_dict()}  # an adapter may have renamed some
                mine = (pair for pair in weights if pair[0].startswith(f"{place.child}."))
                renamed = ((name if name in own else place.renamed(name), tensor) for name, tensor in mine)
                return weights_loader(self).load_weights((name, tensor) for name, tensor in renamed if name is not None)

        loader = loading.DiffusersPipelineLoader(self._settings.LoadConfig(), config)
        loader.counter_before_loading_weights = 0.0
        loader.load_weights(Pipeline())
        return model

    def stage_config(self, folder: Path, place: StagePlace, stage: str = "") -> Any:
        """Their config of a stage, made as their engine makes it: by vLLM first.

        Args:
            stage: another one than the place's
        """
        config = self._settings.ModelConfig(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            hf_overrides={"architectures": [place.architecture]},
        )
        return import_module("vllm_omni.config.model").OmniModelConfig.from_vllm_model_config(
            config,
            model_stage=stage or place.stage,
            model_arch=place.architecture,
            hf_config_name=f"{stage}_config" if stage else place.config_key or None,
        )

    def _stage(self, folder: Path, place: StagePlace) -> nn.Module:
        config = self.stage_config(folder, place)
        text = config.hf_text_config
        text.tie_word_embeddings = False  # a newer transformers keeps it elsewhere
        whole = self._settings.VllmConfig(model_config=config, device_config=self._settings.DeviceConfig(device="cpu"))
        inc = import_module("vllm_omni.quantization.inc_config").OmniINCConfig
        whole.quant_config = inc.maybe_upgrade(whole.quant_config)  # as their engine does
        if whole.quant_config is None:
            raise ValueError("found no quantization config in the files, expected one")
        with self._settings.set_current_vllm_config(whole):
            outer = _at(place.outer)
            whole.quant_config.apply_vllm_mapper(outer.hf_to_vllm_mapper.get_rename_mapper())
            whole.quant_config.packed_modules_mapping.update(getattr(outer, "packed_modules_mapping", {}))
            if not place.model:
                model: nn.Module = outer(vllm_config=whole)
                model.load_weights(_tensors(folder, place))  # type: ignore[operator]
                return model
            inner = whole.with_hf_config(text, architectures=[*place.architectures])
            with self._settings.set_current_vllm_config(inner):
                model = _at(place.model)(vllm_config=inner, prefix=place.module_prefix)
                model.load_weights(_tensors(folder, place))  # type: ignore[operator]
        return model


_STAGES = "vllm_omni.model_executor.models"
_OF_THINKER = ("thinker.model.", "thinker.lm_head.")
#: Tiny repository → where vLLM-Omni has its language model.
STAGES = {
    "qwen_3_omni": StagePlace(
        f"{_STAGES}.qwen3_omni.qwen3_omni_moe_thinker:Qwen3MoeLLMForCausalLM",
        "Qwen3OmniMoeForConditionalGeneration",
        f"{_STAGES}.qwen3_omni.qwen3_omni:Qwen3OmniMoeForConditionalGeneration",
        "thinker",
        "thinker_config",
        ("Qwen3MoeForCausalLM",),
        "thinker.",
        "thinker.language_model",
        _OF_THINKER,
    ),
    "qwen_2_5_omni": StagePlace(
        "vllm.model_executor.models.qwen2:Qwen2ForCausalLM",
        "Qwen2_5OmniForConditionalGeneration",
        f"{_STAGES}.qwen2_5_omni.qwen2_5_omni_thinker:Qwen2_5OmniThinkerForConditionalGeneration",
        "thinker",
        "thinker_config",
        ("Qwen2ForCausalLM",),
        "thinker.",
        "thinker.language_model",
        _OF_THINKER,
    ),
    "qwen_3_tts": StagePlace(
        "",
        "Qwen3TTSTalkerForConditionalGeneration",
        f"{_STAGES}.qwen3_tts.qwen3_tts_talker:Qwen3TTSTalkerForConditionalGeneration",
        "qwen3_tts",
        "",
        (),
        "talker.",
        "",
        ("talker.", "speaker_encoder."),
        "speech_tokenizer",
    ),
}


def _tensors(folder: Path, place: StagePlace) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the language model, as its class is given them."""
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint:
            if place.reads(name):
                yield place.renamed(name) if place.model else name, checkpoint.read(name)


def _at(place: str) -> Any:
    """Something of theirs, `module:name`."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def declare_operators() -> None:
    """Operators of compiled kernels that classes look up when they are built, and that nothing here calls."""
    pairs = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    # Torchvision's compiled part suits one build of torch alone.
    for name, schema in (
        ("_C::silu_and_mul", "(Tensor! out, Tensor x) -> ()"),
        ("torchvision::nms", pairs),
        ("torchvision::qnms", pairs),
    ):
        namespace, _, operator = name.partition("::")
        if not hasattr(getattr(torch.ops, namespace), operator):
            torch.library.define(name, schema)


def _hidream_o1(config: Any) -> nn.Module:
    module = import_module(f"{MODELS}.hidream_o1_image.hidream_o1_image_transformer")
    settings = module.Qwen3VLConfig.from_pretrained(config.model)
    model: nn.Module = module.HiDreamO1ImageTransformer(settings, quant_config=config.quantization_config)
    return model


HIDREAM_O1 = ModelPlace(
    "hidream_o1_image.hidream_o1_image_transformer:HiDreamO1ImageTransformer",
    build=_hidream_o1,
    component="",
    child="model",
    prefix="model.",
    own=("model.language_model.", "model.t_embedder1.", "model.x_embedder.", "model.final_layer2."),
)


def _built(place: ModelPlace, config: Any) -> nn.Module:
    if place.build is not None:
        return place.build(config)
    if place.builder:
        stored = json.loads((Path(config.model) / "transformer" / "config.json").read_text())
        built: nn.Module = _imported(place.builder)(stored, quant_config=config.quantization_config)
        return built
    model_class = place.imported()
    keywords_of = import_module("vllm_omni.diffusion.utils.tf_utils").get_transformer_config_kwargs
    keywords = keywords_of(config.tf_model_config, model_class)
    further = {"od_config": config, "quant_config": config.quantization_config}
    taken = inspect.signature(model_class).parameters
    return model_class(**keywords, **{name: value for name, value in further.items() if name in taken})


def _inspect_classes_here() -> None:
    """Lets vLLM look at model classes in this process, which has the operators, and not in another."""
    registry: Any = import_module("vllm.model_executor.models.registry")

    def inspect_class(model: Any) -> Any:
        return registry._ModelInfo.from_model_cls(model.load_model_cls())  # noqa: SLF001

    registry._LazyRegisteredModel.inspect_model_cls = inspect_class  # noqa: SLF001


def _replace_kernels() -> None:
    """A kernel of theirs for every linear method, as there is one on the device."""
    linear: Any = import_module("vllm.model_executor.kernels.linear")
    cpu = import_module("vllm.platforms.interface").PlatformEnum.CPU
    blocks = import_module("vllm.model_executor.kernels.linear.scaled_mm.cpu").CPUFp8BlockScaledMMKernel
    kernels = {"FP8_BLOCK": blocks}
    for kind, emulation in (("NVFP4", "NvFp4"), ("MXFP8", "Mxfp8"), ("MXFP4", "Mxfp4")):
        kernels[kind] = getattr(linear, f"Emulation{emulation}LinearKernel")
    for kind, kernel in kernels.items():
        getattr(linear, f"_POSSIBLE_{kind}_KERNELS")[cpu] = [_on_any_device(kernel)]
    linear._POSSIBLE_KERNELS[cpu] = [_on_any_device(linear.MarlinLinearKernel)]  # noqa: SLF001
    linear.MarlinNvFp4LinearKernel = linear.EmulationNvFp4LinearKernel
    _replace_expert_kernels()
    svdquant: Any = import_module("vllm_omni.quantization.svdquant_config")
    svdquant._assert_supported = lambda: None  # noqa: SLF001


def _replace_expert_kernels() -> None:
    """The same for stacks of experts."""
    oracles = "vllm.model_executor.layers.fused_moe.oracle"
    backends = {
        "fp8": import_module(f"{oracles}.fp8").Fp8MoeBackend.TRITON,
        "nvfp4": import_module(f"{oracles}.nvfp4").NvFp4MoeBackend.MARLIN,
    }
    for module in ("fp8", "modelopt"):
        methods = import_module(f"{_QUANTIZATION}.{module}")
        for kind, backend in backends.items():
            if hasattr(methods, f"select_{kind}_moe_backend"):
                setattr(methods, f"select_{kind}_moe_backend", partial(_chosen, backend))
    gptq: Any = import_module(f"{_QUANTIZATION}.auto_gptq")
    marlin = import_module(f"{oracles}.int_wna16").WNA16MoEBackend.MARLIN
    gptq.select_wna16_moe_backend = partial(_chosen, marlin)
    # Which real sizes suit, and tiny ones do not.
    sizes: Any = import_module(f"{_QUANTIZATION}.utils.marlin_utils")
    sizes.check_moe_marlin_supports_layer = lambda *_: True
    scheme: Any = import_module(f"{_QUANTIZATION}.inc.schemes.inc_wna16_scheme")
    resolve = scheme._resolve_gptq_moe  # noqa: SLF001
    scheme.INCWna16Scheme.get_moe_method = lambda _self, _config, layer, _prefix, settings: resolve(layer, settings)


def _chosen(backend: Any, *_: object, **__: object) -> tuple[Any, None]:
    return backend, None


def _on_any_device(kernel: Any) -> type:
    def is_supported(_cls: type, _capability: int | None = None) -> tuple[bool, None]:
        return True, None

    def can_implement(_cls: type, _config: Any) -> tuple[bool, None]:
        return True, None

    answers = {"is_supported": classmethod(is_supported), "can_implement": classmethod(can_implement)}
    return type(f"Any{kernel.__name__}", (kernel,), answers)


@dataclass(frozen=True)
class Comparison:
    """Their loaded transformer beside what we wrote and what it was made of.

    Attributes:
        layers: quantized layers whose weight is, in their memory, the one that we wrote
        error: the worst relative error of these weights against the original ones
        wrong: layers that stand for another weight than we wrote, with the reason
        unloaded: their parameters that hold nothing of the files
        left_over: tensors of the files that none of their parameters holds
    """

    layers: int
    error: float
    wrong: tuple[str, ...]
    unloaded: tuple[str, ...]
    left_over: tuple[str, ...]

    @property
    def flaw(self) -> str | None:
        """What went wrong first; None if every layer is loaded, and nothing is left."""
        for what, names in (("wrong", self.wrong), ("not loaded", self.unloaded), ("left over", self.left_over)):
            if names:
                return f"{what}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
        return None if self.layers else "no layer is quantized"


def compare(model: nn.Module, folder: Path, source: Path, place: Place) -> Comparison:
    """Compares their model with what we wrote into `folder` from `source`, both folders of a component."""
    family = ComponentFolder(resolve_source(source), "").family
    modules, wrong, error, done = dict(model.named_modules()), [], 0.0, set()
    with open_quantized(folder) as opened, Checkpoint.open(source) as original:
        specs, methods = dict(original), {layer.format.method for layer in opened.layers.values()}
        groups = family.layer_groups(specs, "vllm-omni", methods, opened.dialect)
        for name, module, members in _layers_there(groups, modules, place):
            merged = name.removeprefix(place.runtime_prefix)
            stored = (merged,) if merged in opened.layers else members  # files may have the merged layer itself
            if not set(stored) <= opened.layers.keys():
                continue
            layers = [opened.layers[stem] for stem in stored]
            if (flaw := _flaw_of(module, layers)) is not None:
                wrong.append(f"{name} ({flaw})")
                continue
            whole = torch.cat([original.read(f"{stem}{WEIGHT}") for stem in members])
            error = max(error, relative_error(_weight_there(module, layers), whole))
            done |= {*stored}
        if not wrong:
            wrong = [f"{stem} (in no layer of theirs)" for stem in opened.layers if stem not in done]
        used = {name for layer in opened.layers.values() for name in layer.sources}
        names = [name for name in opened.checkpoint if name not in used and place.reads(name)]
        kept = {name: opened.checkpoint.read(name) for name in names}
    others = _tensors_of(folder / place.other_folder) if place.other_folder else {}
    quantized = {id(parameter) for module in modules.values() for parameter in _own_parameters(module)}
    free = {name: each for name, each in model.named_parameters() if id(each) not in quantized}
    return Comparison(len(done), error, tuple(wrong), tuple(_unlike(free, kept | others)), tuple(_unlike(kept, free)))


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint}


def _layers_there(
    groups: Iterable[LayerGroup], modules: Mapping[str, nn.Module], place: Place
) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Their layers by name, and the members of each; a version may leave apart what another merges.

    Parameters may be called otherwise than the prefix that their configs see.
    """

    def found(name: str) -> str | None:
        plain = name.removeprefix(place.runtime_prefix)
        return next((each for each in (plain, plain.removesuffix(".0")) if each in modules), None)

    for group in groups:
        merged = found(group.runtime_name)
        if group.stack is not None and (stack := found(f"{group.stack}.routed_experts")) is not None:
            yield group.runtime_name, _expert(modules[stack], group), group.members
        elif merged is not None:
            yield merged, modules[merged], group.members
        else:
            yield from ((name, modules[name], (stem,)) for stem in group.members if (name := found(stem)) is not None)


def _expert(stack: nn.Module, group: LayerGroup) -> nn.Module:
    """A layer of one expert, as a module whose parameters are its parts of the stack's.

    The stack calls those of gate and up `w13_...`, those of down `w2_...`.
    """
    number, _, leaf = group.runtime_name.removeprefix(f"{group.stack}.").partition(".")
    part = nn.Module()
    for name, parameter in stack.named_parameters(recurse=False):
        kind, _, suffix = name.partition("_")
        if (kind == "w2") == (leaf == "down_proj"):
            values = parameter.detach()[int(number)]
            values = values.view(1) if values.dim() == 0 else values
            part.register_parameter(suffix, nn.Parameter(values, requires_grad=False))
    return part


def _flaw_of(module: nn.Module, layers: Sequence[QuantizedLayer]) -> str | None:
    """Why their layer does not stand for ours, or None."""
    if not _is_quantized(module):
        return "built unquantized"
    theirs = _weight_there(module, layers)
    ours = torch.cat([layer.dequantize(0, layer.shape[0]) for layer in layers])
    tolerance = 2**-8 if hasattr(module, "qweight") else ROUNDING  # its scales are kept in bfloat16
    if not torch.allclose(theirs, ours, rtol=tolerance, atol=0):
        return f"relative error {relative_error(theirs, ours):.2g}"
    return _wrong_input_scale(module, layers)


def _weight_there(module: nn.Module, layers: Sequence[QuantizedLayer]) -> Tensor:
    rows = list(getattr(module, "logical_widths", None) or [layer.shape[0] for layer in layers])
    return weight_of(layers[0].format.method, module, rows)


def _wrong_input_scale(module: nn.Module, layers: Sequence[QuantizedLayer]) -> str | None:
    if "input_scale" not in layers[0].tensors:
        return None
    ours: Tensor = torch.stack([layer.read_tensor("input_scale", 0, 0) for layer in layers])
    name = next(each for each in ("input_scale", "input_global_scale") if hasattr(module, each))
    theirs = module.get_parameter(name).detach().view(-1)
    theirs = 1 / theirs if name == "input_global_scale" else theirs
    # One for each part of a merged layer, all the same.
    return (
        None if torch.allclose(theirs, ours[:1], rtol=ROUNDING, atol=0) and ours.max() == ours.min() else "input scale"
    )


def _is_quantized(module: nn.Module) -> bool:
    scales = ("weight_scale", "weight_scale_inv", "scales", "wscales")
    return any(hasattr(module, f"{stack}{name}") for name in scales for stack in ("", "w13_"))


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters of a layer that is built quantized, but its bias; and the scales of a cache of keys and values."""
    if _is_quantized(module) or hasattr(module, "k_scale"):
        yield from (parameter for name, parameter in module.named_parameters(recurse=False) if name != "bias")


def _unlike(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of the tensors whose first row is no row of the others: they may be merged, and reshaped to matrices."""
    known = {row.tobytes() for tensor in others.values() for row in _rows(tensor)}
    return (name for name, tensor in tensors.items() if _rows(tensor)[0].tobytes() not in known)


def _rows(tensor: Tensor) -> Any:
    values = tensor.detach().float()
    matrix = values.reshape(len(values), -1) if values.dim() > 1 else values.reshape(-1, 1)
    return matrix.numpy()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def weight_of(method: str, layer: nn.Module, rows: Sequence[int]) -> Tensor:
    """The weight that a linear of theirs stands for, from its parameters alone, float32 [out, in].

    Args:
        rows: the layer's logical widths, of which each has scales of its own
    """
    parts = {name: tensor.detach() for name, tensor in layer.named_parameters(recurse=False)}
    if "wscales" in parts:
        return _svdquant_weight(parts)
    if "qweight" in parts:
        return _four_bit_weight(parts)
    if "weight_packed" in parts:
        return _packed_weight(parts, rows)
    if method == "nvfp4":
        return _nvfp4_weight(parts, rows)
    return _eight_bit_weight(method, layer, parts, rows)


def _eight_bit_weight(method: str, layer: Any, parts: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
    weight = parts["weight"].float()
    width = weight.shape[1]
    if method == "int8":
        return weight * parts["weight_scale"]
    if "weight_scale_inv" in parts:
        height, size = layer.weight_block_size
        scale = parts["weight_scale_inv"].repeat_interleave(height, dim=0)[: len(weight)]
        return weight * _spread(scale, width, size)
    scale = parts["weight_scale"]
    if method == "fp8":
        return weight * (scale.view(-1, 1) if len(scale) == len(weight) else _by_width(scale, rows))
    weight = weight * _spread(_powers_of_two(scale), width, 32)
    if method == "mxfp4_dualscale":
        weight = weight * _spread(parts["weight_dual_scale"].reshape(len(weight), -1), width, 512)
    return weight * parts["mul_scale"].float() if "mul_scale" in parts else weight


def _svdquant_weight(parts: Mapping[str, Tensor]) -> Tensor:
    """What is multiplied with inputs that are not smoothed yet: the codes, and the branch."""
    codes = torch.stack((parts["qweight"] & 15, parts["qweight"] >> 4 & 15), dim=-1).flatten(1).long()
    scale = parts["wscales"].float().T * parts["wcscales"].float().view(-1, 1) * parts["wtscale"].float()
    weight = _fp4_numbers(codes) * _spread(scale, codes.shape[1], 16) / parts["smooth_factor"].float()
    return weight + parts["proj_up"].float() @ parts["proj_down"].float().T


def _fp4_numbers(codes: Tensor) -> Tensor:
    return torch.tensor([*FP4, *(-value for value in FP4)])[codes]


def _nvfp4_weight(parts: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
    """Decoded by vLLM's emulation."""
    emulation = import_module("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    codes, scales = (torch.split(parts[name], list(rows)) for name in ("weight", "weight_scale"))
    shards = zip(codes, scales, parts["weight_scale_2"], strict=True)
    return torch.cat([emulation.dequantize_to_dtype(*shard, torch.float32, swizzle=False) for shard in shards])


def _packed_weight(parts: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
    """AutoRound's MXFP4 and NVFP4: two codes a byte, the even column in the low nibble."""
    codes = torch.stack((parts["weight_packed"] & 15, parts["weight_packed"] >> 4), dim=-1).flatten(1).long()
    weight = _fp4_numbers(codes)
    scale = parts["weight_scale"]
    if "weight_global_scale" not in parts:
        return weight * _spread(_powers_of_two(scale), weight.shape[1], 32)
    return weight * _spread(scale.float(), weight.shape[1], 16) / _by_width(parts["weight_global_scale"], rows)


def _four_bit_weight(parts: Mapping[str, Tensor]) -> Tensor:
    """GPTQ's layout: eight codes a word along the input, zero points stored less one."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (parts["qweight"].unsqueeze(1) >> shifts.view(1, -1, 1) & 15).flatten(0, 1)  # [in, out]
    zeros = (parts["qzeros"].unsqueeze(-1) >> shifts & 15).flatten(1) + 1  # [groups, out]
    size = len(codes) // len(zeros)
    scales = parts["scales"].float()
    return ((codes - zeros.repeat_interleave(size, dim=0)) * scales.repeat_interleave(size, dim=0)).T


def _powers_of_two(scale: Tensor) -> Tensor:
    if scale.dtype is not torch.uint8:
        raise TypeError(f"found exponents of {scale.dtype}, expected bytes")
    return torch.exp2(scale.float() - 127)


def _by_width(scales: Tensor, rows: Sequence[int]) -> Tensor:
    """One scale for each logical width, as a column."""
    return torch.cat([scales.view(-1)[slot].expand(count, 1) for slot, count in enumerate(rows)])


def _spread(scale: Tensor, width: int, size: int) -> Tensor:
    """Columns of a scale, each over `size` columns of the weight; the last may be cut short."""
    return scale.repeat_interleave(size, dim=1)[:, :width]
