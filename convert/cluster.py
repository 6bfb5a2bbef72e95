"""A Ray cluster: how to reach it, how large it is, and how to run a bounded number of calls on it.

    ray                the cluster that this machine belongs to; without one, all cores of this machine
    ray://HOST:PORT    the cluster whose head listens there (`ray start --head` prints the address, the port is 6379),
                       from one of its machines; with port 10001, that of Ray's client, from any machine
    HOST:PORT          the same

Ray is an optional dependency and takes a second to import, so it is imported only for `--engine ray`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch

from omni_convert.formats.errors import ClusterError, OmniConvertError, RecipeError

__all__ = ["Cluster", "Slots", "check_versions", "connect", "versions"]

Result = TypeVar("Result")

CLIENT_PORT = "10001"
DEFAULT_PORT = "6379"
# Size of the object store when this machine works alone, without a cluster: little data passes through it.
LOCAL_STORE_BYTES = 256 << 20
# How often a task may lose its process or its machine.
MAX_RETRIES = 5
CONNECT_SECONDS = 10.0
VERSIONED_PACKAGES = ("omni-convert", "torch")


@dataclass(frozen=True)
class Slots:
    """The equal slots into which a cluster is divided; each runs one task at a time.

    Attributes:
        count: number of slots
        cores: cores of each slot, all on one machine
        gpus: GPUs of each slot, 0 or 1
        memory: bytes that Ray can reserve on the machine that has the least
    """

    count: int
    cores: int
    gpus: int
    memory: int


class Cluster:
    """A cluster to which this process is connected."""

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray

    def device(self, name: str) -> torch.device:
        """The device of a name; `auto` is a GPU if any machine has one. The device is first tried where it is used.

        Raises:
            RecipeError: there is no such device.
        """
        if name == "auto":
            return torch.device("cuda" if any(_cores_and_gpus(node)[1] for node in self._nodes()) else "cpu")
        try:
            return torch.device(name)
        except RuntimeError:
            raise RecipeError(f"--device: found '{name}', expected auto, cpu or cuda") from None

    def slots(self, cores: int | None, *, needs_gpu: bool) -> Slots:
        """Divides the cluster into equal slots, none of which spans two machines.

        Args:
            cores: cores of each slot; None for all of the smallest machine (divided by its GPUs, if they are needed)
            needs_gpu: whether each slot must have a GPU

        Raises:
            ClusterError: no machine has room for such a slot.
        """
        sizes = [_cores_and_gpus(node) for node in self._nodes()]
        if needs_gpu:
            sizes = [(count, gpus) for count, gpus in sizes if gpus]
        shares = [count // gpus if needs_gpu else count for count, gpus in sizes if count]
        cores = cores or max(1, min(shares, default=1))
        count = sum(min(gpus, count // cores) if needs_gpu else count // cores for count, gpus in sizes)
        if not count:
            raise ClusterError(
                f"the Ray cluster has no machine with {cores} cores{' and a GPU' if needs_gpu else ''}; "
                "use fewer --workers or another --device, or add a machine"
            )
        memory = min(int(node["Resources"].get("memory", 0)) for node in self._nodes())
        return Slots(count, cores, int(needs_gpu), memory)

    def share(self, value: bytes) -> Any:
        """A reference to a value that many tasks use; the value is sent to each machine once."""
        return self._ray.put(value)

    def in_order(
        self,
        function: Callable[..., Result | OmniConvertError],
        calls: Iterable[Sequence[Any]],
        slots: Slots,
        memory: int,
    ) -> Generator[Result]:
        """Results of `function(*arguments)` for each call, in order; as many later calls wait as there are slots.

        Calls that a lost process or machine was working on are repeated. The function returns an `OmniConvertError`
        instead of raising it, and the error is raised here.

        Args:
            function: a function of a module, so that other machines can import it
            calls: the arguments of each call
            slots: the slots; each call occupies one
            memory: bytes that Ray reserves for each call

        Raises:
            ClusterError: a task was lost too often.
        """
        remote = self._ray.remote(function).options(**_options(slots, memory), max_retries=MAX_RETRIES)
        pending: deque[Any] = deque()
        try:
            for arguments in calls:
                pending.append(remote.remote(*arguments))
                if len(pending) > 2 * slots.count:
                    yield self.result(pending.popleft())
            while pending:
                yield self.result(pending.popleft())
        finally:
            for reference in pending:
                self._ray.cancel(reference)

    def on_actors(
        self, kind: type, arguments: Sequence[Any], calls: Sequence[Sequence[Any]], slots: Slots, memory: int
    ) -> Generator[Any]:
        """Results of `kind(*arguments).run(*call)` for each call, in any order; the objects live on the machines.

        Args:
            kind: a class of a module; its method `run` returns an `OmniConvertError` instead of raising it
            arguments: arguments of its constructor, which should leave slow or failing work to the first call
            calls: the arguments of each call
            slots: the slots; each object occupies one
            memory: bytes that Ray reserves for each object

        Raises:
            ClusterError: an object was lost too often.
        """
        remote = self._ray.remote(kind).options(
            **_options(slots, memory), max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES
        )
        actors = [remote.remote(*arguments) for _ in range(min(slots.count, len(calls)))]
        # Work goes to objects that have started, so that one without a place on the cluster delays nothing.
        starting = {actor.__ray_ready__.remote(): actor for actor in actors}
        running: dict[Any, Any] = {}
        left = deque(calls)
        try:
            while left or running:
                (reference, *_), _ = self._ray.wait([*running, *starting])
                result = self.result(reference)
                actor = starting.pop(reference, None)
                if actor is None:
                    actor = running.pop(reference)
                    yield result
                if left:
                    running[actor.run.remote(*left.popleft())] = actor
        finally:
            for actor in actors:
                self._ray.kill(actor)

    def result(self, reference: Any) -> Any:
        """The result of a task.

        Raises:
            OmniConvertError: the task returned this error as its result.
            ClusterError: the task was lost too often, or a machine cannot run it.
        """
        exceptions = self._ray.exceptions
        try:
            result = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise ClusterError(
                    f"a machine of the Ray cluster lacks a package ({error.cause}); install omni-convert on all of them"
                ) from None
            raise
        except exceptions.RayError as error:
            raise ClusterError(
                f"the Ray cluster lost a part of the work {MAX_RETRIES + 1} times ({type(error).__name__}: "
                f"{_first_line(error)}); check its machines, then start again (--resume keeps finished work)"
            ) from None
        if isinstance(result, OmniConvertError):
            raise result
        return result

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]


def _options(slots: Slots, memory: int) -> dict[str, Any]:
    """Ray's options for work that occupies a slot, spread over the machines."""
    needed = {"num_cpus": slots.cores, "num_gpus": slots.gpus, "memory": min(memory, slots.memory)}
    return {**needed, "scheduling_strategy": "SPREAD"}


@contextmanager
def connect(engine: str) -> Iterator[Cluster]:
    """Connects to the cluster that `--engine` names, unless this process is connected already.

    Raises:
        RecipeError: Ray is not installed.
        ClusterError: the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends no usage reports
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default, which silences its warning
    try:
        import ray
    except ImportError as error:
        raise RecipeError(f"--engine {engine}: {error}; install the extra: pip install 'omni-convert[ray]'") from None
    if ray.is_initialized():
        yield Cluster(ray)
        return
    _connect(ray, engine)
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, engine: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = _address(engine)
    try:
        if address != "auto":
            _knock(address)  # Ray itself takes minutes to give up
        ray.init(address=address, **options)
    except ConnectionError as error:
        if address != "auto":
            raise _no_cluster(engine, address, error) from None
        ray.init(address="local", include_dashboard=False, object_store_memory=LOCAL_STORE_BYTES, **options)
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        raise _no_cluster(engine, address, error) from None


def _address(engine: str) -> str:
    """The address in the form that `ray.init` accepts."""
    host, _, port = engine.removeprefix("ray").removeprefix("://").partition(":")
    if not host or host == "auto":
        return "auto"
    return f"ray://{host}:{port}" if port == CLIENT_PORT else f"{host}:{port or DEFAULT_PORT}"


def _knock(address: str) -> None:
    host, _, port = address.removeprefix("ray://").partition(":")
    socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _no_cluster(engine: str, address: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"--engine {engine}: found no Ray cluster at {address} ({_first_line(error)}), expected the address "
        "that `ray start --head` prints"
    )


def _cores_and_gpus(node: dict[str, Any]) -> tuple[int, int]:
    return int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def versions() -> dict[str, str]:
    """Versions of the packages on which the bytes of a result depend."""
    return {package: importlib.metadata.version(package).partition("+")[0] for package in VERSIONED_PACKAGES}


def check_versions(expected: dict[str, str], machine: str) -> None:
    """Checks that this machine has the versions with which the work was begun.

    Raises:
        ClusterError: a version differs.
    """
    for package, version in versions().items():
        if version != expected[package]:
            raise ClusterError(
                f"{machine}: found {package} {version}, expected {expected[package]}, which began the work; "
                "install the same version on all machines of the Ray cluster"
            )
