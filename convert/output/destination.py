"""Where an output goes: a folder on the disk, or a URL."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from omni_convert.convert.execution.component_result import ComponentResult
from omni_convert.convert.execution.local import Engine, Progress, execute_component
from omni_convert.convert.output.folder import check_output, is_finished, partial_folder, partial_path, tidy
from omni_convert.convert.output.remote_folder import RemoteFolder, check_remote, finished_manifest, published_folder
from omni_convert.convert.output.shard_upload import upload_component
from omni_convert.convert.output.upload import Repository, push_output
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import OutputError, RecipeError

__all__ = ["Destination", "destination_of"]


class Destination(ABC):
    """A place for an output.

    Attributes:
        place: as the report names it
    """

    place: Path | RemoteFolder

    @property
    @abstractmethod
    def work(self) -> Path:
        """The local folder in which an unfinished run leaves its work."""

    @abstractmethod
    def check(self, recipe: Recipe, source: Source | None = None) -> None:
        """Checks before any work that the output can be written.

        Args:
            source: the model, if it is already known

        Raises:
            OutputError: something else is there already, or it is the folder of the model.
            RecipeError: the output cannot be pushed to the Hub, or no library for this kind of URL is installed.
        """

    @abstractmethod
    def finished(self) -> AbstractContextManager[Path | None]:
        """Yields a folder with the manifest of the output that an earlier run finished, or None if there is none."""

    @abstractmethod
    def opened(self, recipe: Recipe) -> AbstractContextManager[Path]:
        """Yields the folder in which files are made until the output is complete; on success, puts them in place.

        Raises:
            OutputError: the output is in the way or in use, or cannot be written.
        """

    @abstractmethod
    def make(self, component: ComponentPlan, folder: Path, engine: Engine, progress: Progress) -> ComponentResult:
        """Makes the weights of one component.

        Args:
            folder: the component's, in the folder of `opened`
        """

    @abstractmethod
    def push(self, repository: Repository) -> str:
        """Uploads the finished output to the Hub, and returns the commit's address.

        Raises:
            HubError: the Hub refuses the upload, or cannot be reached.
        """


@dataclass(frozen=True)
class _Folder(Destination):
    place: Path

    @property
    def work(self) -> Path:
        return partial_path(self.place)

    def check(self, recipe: Recipe, source: Source | None = None) -> None:
        check_output(self.place, overwrite=recipe.overwrite, resume=recipe.resume)
        if source is None:
            return
        output, model = self.place.resolve(), source.path.resolve()
        if output == model or model in output.parents or output in model.parents:
            raise OutputError(f"{output}: found the folder of the model that is read ({model}); name another --output")

    @contextmanager
    def finished(self) -> Iterator[Path | None]:
        if not is_finished(self.place):
            yield None
            return
        tidy(self.place)
        yield self.place

    def opened(self, recipe: Recipe) -> AbstractContextManager[Path]:
        return partial_folder(self.place, overwrite=recipe.overwrite, resume=recipe.resume)

    def make(self, component: ComponentPlan, folder: Path, engine: Engine, progress: Progress) -> ComponentResult:
        """Makes the weights, then checks that the files hold every planned tensor in its dtype and shape."""
        result = execute_component(component, folder, engine, progress)
        Checkpoint.open(folder).close()
        for file, specs in component.shards.files.items():
            component.shards.container.check(folder / file, specs)
        return result

    def push(self, repository: Repository) -> str:
        return push_output(self.place, repository)


@dataclass(frozen=True)
class _Url(Destination):
    place: RemoteFolder

    @property
    def work(self) -> Path:
        return self.place.staging

    def check(self, recipe: Recipe, source: Source | None = None) -> None:  # noqa: ARG002  # no model is at a URL
        if recipe.push_to_hub is not None:
            raise self._cannot_be_pushed()
        check_remote(self.place, overwrite=recipe.overwrite, resume=recipe.resume)

    @contextmanager
    def finished(self) -> Iterator[Path | None]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) if finished_manifest(self.place, Path(folder)) else None

    def opened(self, recipe: Recipe) -> AbstractContextManager[Path]:
        return published_folder(self.place, overwrite=recipe.overwrite, resume=recipe.resume)

    def make(self, component: ComponentPlan, folder: Path, engine: Engine, progress: Progress) -> ComponentResult:  # noqa: ARG002  # shards go to the URL
        return upload_component(self.place, component, engine, progress)

    def push(self, repository: Repository) -> str:  # noqa: ARG002  # `check` refuses earlier
        raise self._cannot_be_pushed()

    def _cannot_be_pushed(self) -> RecipeError:
        return RecipeError(f"--push-to-hub: found --output {self.place}, expected a folder, whose files can be sent")


def destination_of(output: str | Path) -> Destination:
    """The place that the user names: a URL or a path."""
    if isinstance(output, str) and "://" in output:
        return _Url(RemoteFolder(output))
    path = Path(output)
    return _Folder(path.resolve() if path.name in ("", "..") else path)  # the work is done beside it, under its name
