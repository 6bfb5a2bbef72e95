"""Runs models that are larger than memory: a block of a model is in memory while it runs, and then given up.

A *part* of a model is a block, which is an entry of one of its outermost `ModuleList`s, or the rest of the model. The
rest is present while the model runs, and one block beside it; the block that ran after this one the last time is read
ahead. Only one model has parts in memory at a time.

On a CPU, a tensor that is stored in the dtype in which it computes is a view of the mapped file for good: presence is a
matter of pages. Any other is on the meta device, and becomes a copy for the time in which its part is present.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_convert.loaders.memory.allocator import release_free_memory
from omni_convert.loaders.memory.budget import available_memory
from omni_convert.loaders.memory.mapped_file import MappedFile

__all__ = ["Part", "StoredTensor", "Streamer", "repeated_blocks"]


@dataclass(eq=False)
class StoredTensor:
    """A parameter or buffer of a model whose values lie in a file.

    Attributes:
        places: modules and the names under which they have it; several share a tied one
        name: its name in the file
        dtype: that in which the model computes with it
        is_ready: the modules have a view of the file for good
    """

    places: tuple[tuple[nn.Module, str], ...]
    file: MappedFile
    name: str
    dtype: torch.dtype
    is_ready: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.file.specs[self.name].nbytes

    @property
    def memory_bytes(self) -> int:
        """Bytes on the device."""
        spec = self.file.specs[self.name]
        return self.nbytes // spec.dtype.itemsize * self.dtype.itemsize

    def settle(self, device: torch.device) -> None:
        """Gives the modules a view of the file if that is what they compute with, or else a tensor without values.

        A module that repacks what it gets keeps no view.
        """
        stored = self.file.tensor(self.name)
        if device.type == "cpu" and stored.dtype == self.dtype:
            self.put(stored)
            module, name = self.places[0]
            self.is_ready = getattr(module, name).data_ptr() == stored.data_ptr()
        if not self.is_ready:
            self.clear()

    def clear(self) -> None:
        """Gives the modules a tensor without values."""
        self.put(torch.empty(self.file.specs[self.name].shape, dtype=self.dtype, device="meta"))

    def copy(self, device: torch.device) -> Tensor:
        """The values on a device, in the dtype in which they are computed with."""
        stored = self.file.tensor(self.name)
        if device.type == "cuda":
            stored = stored.pin_memory()
        copied = stored.to(device, self.dtype, non_blocking=True)
        self.file.give_up(self.name)
        return copied

    def put(self, tensor: Tensor) -> None:
        """Gives the modules a tensor."""
        module, name = self.places[0]
        is_parameter = name in module._parameters  # noqa: SLF001  # a buffer otherwise
        shared = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for module, name in self.places:
            setattr(module, name, shared)


@dataclass(eq=False)
class Part:
    """A block of a component, or the rest of it.

    Attributes:
        component: the name of the model in its pipeline
        block: name of the block's module; empty for the rest
        module: the block; the whole model for the rest
        repeats: the component runs once for each denoising step
    """

    component: str
    block: str
    module: nn.Module
    repeats: bool
    tensors: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in files."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def memory_bytes(self) -> int:
        """Bytes on the device while it is present."""
        return sum(tensor.memory_bytes for tensor in self.tensors)


#: Called before a part runs, with the bytes of the tensors that go into it.
Gate = Callable[[Part, int], None]


class _Place(threading.local):
    """The component that each thread is in."""

    component: str | None = None


class Streamer:
    """Brings the parts of models to a device when they run, and gives them up.

    Attributes:
        gate: waits until this thread may run a part; None where there is one thread
        at_give_up: called with each part that is given up
        read_bytes: component → bytes of parts that were brought
        groups: sizes of the groups of prompts that have shared its blocks
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        """Begins with no model.

        Args:
            device: where the models run
            limit: bytes that they may take, with what they compute; None for what is free
        """
        self.device = device
        self._limit = limit
        self.gate: Gate | None = None
        self.at_give_up: Callable[[Part], None] | None = None
        self.read_bytes: dict[str, int] = {}
        self.groups: list[int] = []
        self._parts: dict[str, list[Part]] = {}
        self._rest: Part | None = None
        self._block: Part | None = None
        self._next: dict[Part, Part] = {}
        self._ahead: tuple[Part, Future[list[Tensor]]] | None = None
        self._copied: dict[int, StoredTensor] = {}
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._place = _Place()

    def add(self, component: str, model: nn.Module, tensors: Iterable[StoredTensor], *, repeats: bool) -> None:
        """Streams a model from now on.

        Args:
            tensors: those of the model that are to be streamed; it has all others already
            repeats: it runs once for each denoising step
        """
        _report_device(model, self.device)
        blocks = repeated_blocks(model)
        owners = {module: name for name, block in blocks.items() for module in block.modules()}
        of_part: dict[str, list[StoredTensor]] = {name: [] for name in ("", *blocks)}
        for tensor in tensors:
            tensor.settle(self.device)
            names = {owners.get(module, "") for module, _ in tensor.places}
            of_part[names.pop() if len(names) == 1 else ""].append(tensor)
        modules = {"": model, **blocks}
        rest, *others = (Part(component, name, modules[name], repeats, tuple(found)) for name, found in of_part.items())
        self._parts[component] = [rest, *others]
        self._next |= dict(zip(others, [*others[1:], *others[:1]] if repeats else others[1:], strict=False))
        self.read_bytes[component] = 0
        for module in {model, *(module for module in model.modules() if module not in owners and _holds(module))}:
            module.register_forward_pre_hook(self._before_rest(rest))
        for part in others:
            hook = self._before_block(part)
            blocks[part.block].register_forward_pre_hook(hook, with_kwargs=True)

    def watch(self, component: str, model: nn.Module) -> None:
        """Has everything given up when a model runs that is present for good."""
        rest = Part(component, "", model, repeats=False, tensors=())
        self._parts[component] = [rest]
        self.read_bytes[component] = 0
        for module in model.modules():
            if _holds(module):
                module.register_forward_pre_hook(self._before_rest(rest))

    @property
    def parts(self) -> list[Part]:
        """The parts of all components."""
        return [part for parts in self._parts.values() for part in parts]

    def room(self) -> int:
        """Bytes for what the models compute, beside two blocks and the rest of the one that needs most for these."""
        memory = available_memory(self.device) if self._limit is None else self._limit
        return memory - max(
            rest.memory_bytes + 2 * max((block.memory_bytes for block in blocks), default=0)
            for rest, *blocks in self._parts.values()
        )

    def enter(self, part: Part) -> None:
        """Makes a part present, and the rest of its component; gives up what is not needed for it."""
        if self._rest is None or self._rest.component != part.component:
            self.release()
            self._rest = self._parts[part.component][0]
            self._bring(self._rest)
        if not part.block or part is self._block:
            return
        if self._block is not None:
            if self._block.component == part.component and self._block.repeats:
                self._next[self._block] = part
            self._give_up(self._block)
        self._block = part
        self._bring(part)
        self._read_ahead(self._next.get(part))

    def sparing_gradients(self) -> AbstractContextManager[None]:
        """While entered, what is kept for gradients holds no weight of a part; it is read again for them."""
        return torch.autograd.graph.saved_tensors_hooks(self._without_copy, _with_copy)

    def release(self) -> None:
        """Gives up everything."""
        for part in filter(None, (self._block, self._rest)):
            self._give_up(part)
        self._block = self._rest = self._ahead = None
        if self.device.type == "cpu":
            release_free_memory()

    def _before_rest(self, rest: Part) -> Callable[..., None]:
        def arrive(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            is_here = self._rest is rest and self._place.component == rest.component
            if not is_here:
                self._arrive(rest, 0)

        return arrive

    def _before_block(self, part: Part) -> Callable[..., None]:
        def arrive(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._arrive(part, sum(tensor.nbytes for tensor in _tensors_in((args, kwargs))))

        return arrive

    def _arrive(self, part: Part, size: int) -> None:
        self._place.component = part.component
        if self.gate is not None:
            self.gate(part, size)
        self.enter(part)

    def _bring(self, part: Part) -> None:
        self.read_bytes[part.component] += part.nbytes
        ahead, self._ahead = self._ahead, None
        copies = ahead[1].result() if ahead is not None and ahead[0] is part else self._copies(part)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        copied = iter(copies)
        for tensor in part.tensors:
            if not tensor.is_ready:
                values = next(copied)
                if self._stream is not None:
                    values.record_stream(torch.cuda.current_stream(self.device))
                self._copied[values.untyped_storage().data_ptr()] = tensor
                tensor.put(values)
            elif part.block:  # of the rest, most may never be touched, as embeddings of other tokens
                tensor.file.read(tensor.name)

    def _copies(self, part: Part) -> list[Tensor]:
        """The tensors of a part that are no views, on the device."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return [tensor.copy(self.device) for tensor in part.tensors if not tensor.is_ready]

    def _read_ahead(self, part: Part | None) -> None:
        """Reads a part while the one before it runs: to the device, or on a CPU into the system's page cache."""
        if part is None:
            return
        if self._stream is None:
            self._reader.submit(_read_ahead, part)
        else:
            self._ahead = part, self._reader.submit(self._copies, part)

    def _without_copy(self, saved: Tensor) -> Tensor | Callable[[], Tensor]:
        """A tensor that autograd keeps; for a part of a copied weight, a function that reads it again."""
        stored = self._copied.get(saved.untyped_storage().data_ptr())
        if stored is None:
            return saved
        place = saved.size(), saved.stride(), saved.storage_offset()
        return lambda: stored.copy(self.device).as_strided(*place)

    def _give_up(self, part: Part) -> None:
        self._copied = {address: tensor for address, tensor in self._copied.items() if tensor not in part.tensors}
        for tensor in part.tensors:
            if tensor.is_ready:
                tensor.file.give_up(tensor.name)
            else:
                tensor.clear()
        if self.at_give_up is not None:
            self.at_give_up(part)


def _with_copy(saved: Tensor | Callable[[], Tensor]) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()


def _read_ahead(part: Part) -> None:
    for tensor in part.tensors:
        tensor.file.read_ahead(tensor.name)


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The entries of a model's outermost lists of modules that are called, by name."""
    blocks: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            is_entry = isinstance(module, nn.ModuleList) and type(child).forward is not nn.Module.forward
            if is_entry and any(True for _ in child.parameters()):
                blocks[prefix + name] = child
            else:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return blocks


def _report_device(model: nn.Module, device: torch.device) -> None:
    """Has `model.device` say where the model runs: pipelines put its inputs there, and its tensors may be elsewhere."""
    kind = type(model)
    namespace = {"device": property(lambda _: device), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (kind,), namespace)


def _holds(module: nn.Module) -> bool:
    """Whether a module has tensors of its own."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return bool(own)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)
