"""Writes what pipelines make: an image, or every frame of a video."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from omni_convert.formats.errors import OutputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["VIDEO_SUFFIX", "check_frames_path", "write_frames"]

VIDEO_SUFFIX = ".mp4"
#: Image formats that hold a video; others get a file for each frame.
ANIMATED = (".gif", ".webp")
VIDEO_PACKAGES = ("imageio", "imageio_ffmpeg")


def check_frames_path(path: Path) -> None:
    """Checks, before minutes of work, that frames can be written to a path.

    Raises:
        OutputError: no format has the path's extension, what writes that format is not installed, or there is no such
            folder.
    """
    from PIL import Image

    suffix = path.suffix.lower()
    if suffix != VIDEO_SUFFIX and Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise OutputError(
            f"{path}: found no file extension of an image format, expected one like .png, or {VIDEO_SUFFIX} for videos"
        )
    missing = [name.replace("_", "-") for name in VIDEO_PACKAGES if find_spec(name) is None]
    if suffix == VIDEO_SUFFIX and missing:
        raise OutputError(
            f"{path}: found no package {' and '.join(missing)}, which writes {VIDEO_SUFFIX}; "
            f"pip install 'omni-convert[video]', or name a {' or '.join(ANIMATED)} file"
        )
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: found no folder {path.parent}, expected an existing one; create it first")


def write_frames(frames: Sequence[Image], path: Path, fps: int) -> list[Path]:
    """Writes every frame.

    Args:
        path: a video (.mp4, .gif, .webp), or an image; several frames get numbers in front of its extension
        fps: frames per second of a video

    Returns:
        the files

    Raises:
        OutputError: a file cannot be written.
    """
    suffix = path.suffix.lower()
    is_one_file = len(frames) == 1 or suffix == VIDEO_SUFFIX or suffix in ANIMATED
    paths = [path] if is_one_file else [path.with_stem(f"{path.stem}_{index}") for index in range(len(frames))]
    try:
        if suffix == VIDEO_SUFFIX:
            _write_video(frames, path, fps)
        elif is_one_file and len(frames) > 1:
            _write_animation(frames, path, fps)
        else:
            for frame, file in zip(frames, paths, strict=True):
                frame.save(file)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written ({error})") from None
    return paths


def _write_video(frames: Sequence[Image], path: Path, fps: int) -> None:
    from diffusers.utils import export_to_video

    # Encoders want even sizes; a larger unit would scale the frames.
    export_to_video([frame.convert("RGB") for frame in frames], str(path), fps=fps, macro_block_size=2)


def _write_animation(frames: Sequence[Image], path: Path, fps: int) -> None:
    rest, milliseconds = frames[1:], 1000 / fps
    # Only WebP takes `lossless`; other formats ignore it.
    frames[0].save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0, lossless=True)
