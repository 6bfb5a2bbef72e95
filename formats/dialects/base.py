"""The contract of a dialect: how a producer or runtime spells the formats on disk.

Reading:  recognises(found) ─► stored_layers(found): for each quantized layer its format, and where its tensors are
Writing:  spelling(format, shape) for each layer; config block, marker tensors and header metadata around them
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.codec import PLAIN, Codec, WritableCodec
from omni_convert.formats.dialects.found import Found
from omni_convert.formats.dialects.verdict import OURS, VLLM_OMNI, Verdict
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.original_names import CutLayer, OriginalTensor
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.rows import TensorLayout

__all__ = [
    "Dialect",
    "Found",
    "JudgedComponent",
    "LayerError",
    "Spelling",
    "StoredLayer",
    "WrittenSpelling",
    "attempt",
    "two_sizes",
]

P = ParamSpec("P")
# The leaf of a language model's head, which is no linear in vLLM.
HEAD = "lm_head"


@dataclass(frozen=True)
class Spelling:
    """How the tensors of a format lie on disk.

    Attributes:
        names: canonical suffix to the suffix on disk, where they differ
        codecs: canonical suffix to codec, where it is not `PLAIN`
        bias: how the layer's bias is laid out; None for its natural order
        lacks_shift: the bias on disk lacks what the shift of the inputs adds to outputs (`Format.shift_product`)
    """

    names: Mapping[str, str] = field(default_factory=dict)
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    bias: WritableCodec | None = field(default=None, kw_only=True)
    lacks_shift: bool = field(default=False, kw_only=True)

    def name(self, suffix: str) -> str:
        """The suffix on disk of a canonical one."""
        return self.names.get(suffix, suffix)

    def codec(self, suffix: str) -> Codec:
        return self.codecs.get(suffix, PLAIN)

    @property
    def row_multiple(self) -> int:
        """Rows of the weight that are encoded together."""
        return max((codec.row_multiple for codec in self.codecs.values()), default=1)


@dataclass(frozen=True)
class WrittenSpelling(Spelling):
    """How the tensors of a format are written.

    Attributes:
        extras: suffix on disk to the bytes of a tensor that only marks the layer
        zeros: suffix on disk of a tensor of zeros (no offset) to the canonical suffix of the tensor whose shape and
            dtype it has
        copies: suffix on disk to the canonical suffix of a tensor that is stored under both names
    """

    codecs: Mapping[str, WritableCodec] = field(default_factory=dict)
    extras: Mapping[str, bytes] = field(default_factory=dict)
    zeros: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    def codec(self, suffix: str) -> WritableCodec:
        return self.codecs.get(suffix, PLAIN)

    def layout(self, layouts: Mapping[str, TensorLayout]) -> dict[str, TensorLayout]:
        """Suffix on disk to what is stored there."""
        stored = {self.name(suffix): self.codec(suffix).stored(layout) for suffix, layout in layouts.items()}
        marks = {name: TensorLayout(torch.uint8, (len(text),), 0) for name, text in self.extras.items()}
        zeros = {name: layouts[like] for name, like in self.zeros.items() if like in layouts}
        copies = {name: stored[self.name(like)] for name, like in self.copies.items() if like in layouts}
        return stored | copies | zeros | marks

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors of some rows to stored ones, and the marks."""
        stored = {self.name(suffix): self.codec(suffix).encode(tensor) for suffix, tensor in tensors.items()}
        zeros = {name: torch.zeros_like(tensors[like]) for name, like in self.zeros.items() if like in tensors}
        copies = {name: stored[self.name(like)] for name, like in self.copies.items() if like in tensors}
        return stored | copies | zeros | self.marks()

    def marks(self) -> dict[str, Tensor]:
        return {name: torch.tensor(list(text), dtype=torch.uint8) for name, text in self.extras.items()}


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer as it was found.

    Attributes:
        stem: its name, as the rest of the pipeline calls it
        format: what its canonical tensors are
        shape: [out, in]
        spelling: where they are
        place: prefix of its tensors in the file, where it is not `stem`
        places: canonical suffix to whole tensor name, for those that lie elsewhere
        unused: names of tensors that add nothing (marks, zero offsets)
        ones: canonical suffixes of tensors that are left out because every number in them would be 1
        weight: the pipeline's name of the weight, where it is not `stem`.weight
        is_full_precision: the file says that it is multiplied in the model's dtype, with plain activations
    """

    stem: str
    format: Format
    shape: tuple[int, int]
    spelling: Spelling = field(default_factory=Spelling)
    place: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    weight: str | None = None
    is_full_precision: bool = False

    @property
    def weight_name(self) -> str:
        """Name of the weight in the rest of the pipeline."""
        return self.weight or f"{self.stem}.weight"

    def name_of(self, suffix: str) -> str:
        """Name in the file of a canonical tensor."""
        prefix = self.stem if self.place is None else self.place
        return self.places.get(suffix) or f"{prefix}.{self.spelling.name(suffix)}"


@dataclass(frozen=True)
class JudgedComponent:
    """A quantized component, as runtimes see it.

    Attributes:
        layers: stem to format
        refusal: why vLLM-Omni refuses or misreads it in a dialect that it knows, or None
        checkpoint: its tensors, for dialects whose readers depend on more than formats
        family: the model's family; None if no config names it
    """

    layers: Mapping[str, Format]
    refusal: str | None = None
    checkpoint: Checkpoint | None = None
    family: Family | None = None

    @property
    def methods(self) -> set[str]:
        """The methods of its layers."""
        return {fmt.method for fmt in self.layers.values()}


class LayerError(CheckpointError):
    """A layer that its dialect cannot read: strict reading raises the first, `verify` reports them all.

    Attributes:
        layer: name of the layer or tensor
        what: what was found and expected
        check: the check of `verify` that reports it
        effect: what its readers do with it, where that is known
    """

    def __init__(
        self, found: Found, layer: str, message: str, check: str = "unreadable-layer", effect: str | None = None
    ) -> None:
        super().__init__(f"{found.checkpoint.path}: {message}")
        self.layer, self.check, self.effect = layer, check, effect
        self.what = message.removeprefix(f"layer '{layer}': ")


def two_sizes(value: Any) -> tuple[int, int] | None:
    """A list of two positive integers as a tuple; None for anything else."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)
    return (value[0], value[1]) if is_pair else None


def attempt(read: Callable[P, StoredLayer], *arguments: P.args, **options: P.kwargs) -> StoredLayer | LayerError:
    """Returns the result of `read`, or the error that it raises about its layer."""
    try:
        return read(*arguments, **options)
    except LayerError as error:
        return error


class Dialect(ABC):
    """One spelling; one instance each, in a file of its own."""

    #: The name that users give.
    name: str
    #: The programs that read it, as findings name them.
    consumers: str
    #: Runtimes whose scope a conversion may obey: which layers to quantize. The first is the default.
    runtimes: tuple[str, ...] = ("vllm-omni", "diffusers")
    #: Verdicts that hold for every format.
    usual_verdicts: tuple[Verdict, ...] = ()
    #: Runtimes that refuse a component with a tensor missing or too many; others load it without a word.
    strict_runtimes: tuple[str, ...] = (OURS, VLLM_OMNI)
    #: What declares the layers quantized: a config block, marks or labels elsewhere, the container, or nothing.
    declared_by: Literal["block", "marks", "container", "nothing"] = "block"
    #: Whether vLLM-Omni copies the tensors into parameters that it has allocated: their names and dtypes, and the
    #: choice of layers, must be exactly those that it builds.
    fills_vllm_omni_parameters: bool = False
    #: Whether vLLM-Omni takes the parts of a layer that it merges; else it must find the merged layer.
    takes_parts: bool = True
    #: Whether readers compare the shapes of tensors, not only their numbers of elements.
    has_exact_shapes: bool = False
    #: Whether the name of a merged layer in the list of ignored ones is enough, without those of its parts.
    ignores_merged_layers_by_name: bool = False
    #: Whether its list of ignored layers holds the layers that the runtime would build quantized, and no other linears.
    lists_built_layers: bool = False
    #: Whether it has a method for weights that are only stored quantized, as those of VAEs.
    has_storage: bool = False
    #: Whether all tensors must be in one file.
    is_single_file: bool = False
    #: Whether readers look for all tensors of a layer in the file of its weight, so that no shard ends within a layer.
    keeps_layers_whole: bool = False
    #: Names of tensors that its readers expect: those of diffusers; the original ones of the model's own code; both,
    #: since diffusers reads the files and converts the original ones; others, which `tensors_of` gives; or those of
    #: the model that was quantized.
    names_expected: Literal["diffusers", "original", "both", "others", "source"] = "diffusers"
    #: Whether its writers recast and reshape the tensors that they do not quantize.
    recasts_kept_tensors: bool = False
    #: Whether its block names layers that are quantized, or their blocks, which readers look up by the runtime's names.
    lists_runtime_names: bool = False
    #: Whether scales in BF16 are those with which its writers made the codes, so that nothing is lost.
    has_low_precision_scales: bool = False
    #: Whether transformers reads it, which looks layers up by the names in its model, where files have others.
    looks_up_model_names: bool = False
    #: The same as `has_low_precision_scales` for tensors with these canonical suffixes alone.
    low_precision_parts: tuple[str, ...] = ()
    #: Whether its block names the blocks that are quantized, so that stages with others leave it aside.
    names_quantized_blocks: bool = False
    #: Methods whose layers may stand beside each other in a component, from few bits to many.
    mixed_methods: tuple[str, ...] = ()
    #: Why files are only written with --force; None if their readers have run such files.
    unproven: str | None = None
    #: How to run a conversion, for its model card. `{title}` and `{dialect}` are those of the result; `{model_class}`,
    #: `{folder}` and `{file}` those of a component.
    instructions: str = "The files are spelled for {dialect}; `omni-convert inspect` tells which runtimes load them."
    #: Whether FP8 with dynamic activations has a scale for each row.
    is_dynamic_fp8_per_row: bool = False

    def shown_name(self, found: Found) -> str:
        """The name that `inspect` and `verify` show."""
        return self.name

    def for_family(self, family: Family | None) -> Dialect:
        """The dialect as it spells models of a family; None stands for an unknown one."""
        return self

    def cuts(self, family: Family) -> tuple[CutLayer, ...]:
        """Layers of diffusers that its readers hold as two."""
        return ()

    @abstractmethod
    def recognises(self, found: Found) -> bool:
        """Whether a checkpoint is in this dialect."""

    @abstractmethod
    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        """Every quantized layer; in place of one that cannot be read, the error that says why.

        Raises:
            CheckpointError: the component as a whole cannot be read.
        """

    def kept_names(self, found: Found, stored: Collection[str]) -> dict[str, str]:
        """Name in the pipeline → name in the file, of every tensor that is not quantized.

        A tensor that only marks the file is left out.
        """
        return {name: name for name in stored}

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        """How a layer of this format and shape is written, or why it cannot be."""
        return f"{self.name} is only read"

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any] | None:
        """The value of `quantization_config` in config.json, or None if the dialect has none.

        Args:
            layers: stem to format, and `LayerGroup.names` of what runtimes merge where the dialect lists them
            ignored: names of linears that are not quantized
        """
        return None

    def block_flaw(self, block: Mapping[str, Any]) -> str | None:
        """Why vLLM-Omni refuses the block of a dialect that it reads, or None."""
        return None

    def encoder_block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any] | None:
        """The config block, as `block` makes it, of a component that transformers loads."""
        return self.block(layers, ignored)

    def sidecars(self, layers: Mapping[str, Format], names: Collection[str]) -> dict[str, dict[str, Any]]:
        """JSON files to write beside the weights: name to content.

        Args:
            layers: stem to format
            names: all tensors that are written
        """
        return {}

    def fitted_format(self, fmt: QuantizingFormat, family: Family, stem: str) -> QuantizingFormat:
        """The format as readers run it in this layer."""
        return fmt

    def own_format(self, family: Family, stem: str) -> QuantizingFormat | None:
        """The one format that readers expect of a layer, whatever the method; None for most layers."""
        return None

    def in_full_precision(self, spelling: WrittenSpelling) -> WrittenSpelling | None:
        """The spelling of a layer that is multiplied in the model's dtype; None if the dialect cannot say so."""
        return None

    def metadata(self, layers: Mapping[str, Format], full_precision: Collection[str] = ()) -> dict[str, str]:
        """Free text for the file's header.

        Args:
            layers: stem to format
            full_precision: stems of the layers that are multiplied in the model's dtype
        """
        return {}

    def model_metadata(self, config: Mapping[str, Any], family: Family) -> dict[str, str]:
        """Free text about the model for the file's header.

        Args:
            config: the component's config.json
        """
        return {}

    def kept_metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """The entries of a source's header that its readers obey, apart from those about quantization."""
        return {}

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        """The verdict of each runtime on a component."""
        return list(self.usual_verdicts)

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        """Everything that block, marks and labels declare and the tensors, or the readers, contradict.

        Args:
            layers: stem to each layer that can be read
            config: the component's config.json; {} if there is none
        """
        yield from ()

    def is_run_opened(self, formats: Collection[Format]) -> bool:
        """Whether our loader runs layers of these formats although no library loads them: it reads each by itself."""
        return False

    @property
    def renames_tensors(self) -> bool:
        """Whether files are written with other names than diffusers', since its readers know no others."""
        return self.names_expected in ("original", "others")

    def model_flaw(self, family: Family | None, methods: Collection[str]) -> str | None:
        """Why its readers cannot take a model in these methods at all; None if they can.

        Args:
            family: the model's family; None if no config names it
        """
        return None

    def tensors_of(self, family: Family, specs: Mapping[str, TensorSpec]) -> dict[str, OriginalTensor] | None:
        """Name → tensor of a model, as its readers know it, if `renames_tensors`; None if the names are not known.

        Args:
            specs: the tensors of the model in diffusers
        """
        return family.original_tensors(specs)

    def are_names_of_readers(self, family: Family, names: Collection[str]) -> bool:
        """Whether names of tensors may be those of its readers where these differ from diffusers'."""
        return bool(family.original_names) and not family.has_names_of_diffusers(names)

    def model_stems(self, stem: str) -> tuple[str, ...]:
        """The layers of the model in diffusers of which a stored layer consists, in the order of their rows."""
        return (stem,)

    def part_of(self, stem: str) -> tuple[str, int] | None:
        """The layer of the model in diffusers of which a stored layer holds some columns, and the number of its part.

        None for most layers.
        """
        return None

    def names_flaw(self, family: Family, names: Iterable[str]) -> str | None:
        """Why its readers do not know the names of a model's tensors; None if they do."""
        return None

    def declared_blocks(self, block: Mapping[str, Any]) -> tuple[int, int] | None:
        """Rows and columns that share a scale, as the block declares them; None if it does not."""
        return two_sizes(block.get("weight_block_size"))

    def ignored_entries(self, block: Mapping[str, Any]) -> tuple[str, ...]:
        """The block's list of ignored layers, as it is written; () where there is none."""
        return ()

    def is_ignored(self, name: str, entries: Collection[str]) -> bool:
        """Whether a list of ignored layers covers a layer's name."""
        return name in entries

    def is_covered(self, name: str, kept: str) -> bool:
        """Whether readers leave a layer unquantized because a kept one, whose name they ignore, has a similar name."""
        return False

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        """Whether readers take a linear for quantized by the block alone; False where they look at its tensors."""
        return False

    def leaves_unlisted(self, block: Mapping[str, Any], stem: str) -> bool:
        """Whether vLLM leaves a linear of an autoregressive stage as it is although the block does not list it."""
        return stem.rpartition(".")[2] == HEAD

    def is_dequantized_by_vllm_omni(self, methods: Collection[str]) -> bool:
        """Whether vLLM-Omni dequantizes such layers where it builds them unquantized."""
        return False
