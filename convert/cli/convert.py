"""Commands that write a model: convert, dequantize, push."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omni_convert.convert.cli.options import (
    budget_options,
    calibration_options,
    engine_option,
    format_options,
    memory_option,
    recipe_of,
    report_option,
)
from omni_convert.convert.cli.output import announce_demo, command_line, print_lines, quieten_hub, silence_libraries
from omni_convert.convert.progress_bar import progress_bar
from omni_convert.convert.recipe import (
    ACTIVATION_SCHEMES,
    DTYPES,
    METHODS,
    ROUNDINGS,
    RUNTIMES,
)
from omni_convert.convert.source.readahead import start_reading
from omni_convert.formats.dialects.table import WRITTEN

if TYPE_CHECKING:
    from omni_convert.convert.output.destination import Destination

__all__ = ["convert_command", "dequantize_command", "push_command"]


@click.command("convert")
@click.argument("model", required=False)
@click.option(
    "-m",
    "--method",
    default="fp8",
    show_default=True,
    help=f"One of {', '.join(METHODS)}; or keep: write a quantized model in another --dialect.",
)
@click.option(
    "--dialect", type=click.Choice(WRITTEN), default="vllm-omni", show_default=True, help="Names and layout on disk."
)
@click.option("-o", "--output", help="Folder, or a URL for fsspec. Default: ./<model name>-<method>.")
@click.option("--config", metavar="FILE|REPO_ID", help="Config of a single file that has none beside it.")
@click.option("--calib", type=click.Path(path_type=Path), help="Prompts to calibrate on: one per line, or JSON Lines.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Statistics file to reuse; repeatable, files are merged.",
)
@calibration_options
@click.option("--activation-scheme", type=click.Choice(ACTIVATION_SCHEMES), help="Default: static with statistics.")
@format_options
@budget_options
@click.option(
    "--ignored-layers", multiple=True, metavar="PATTERN", help="Name, fnmatch pattern or dotted part; or a JSON list."
)
@click.option(
    "--component",
    multiple=True,
    metavar="NAME=METHOD|FILE",
    help="e.g. text_encoder=fp8, transformer_2=none; or transformer=FILE: its weights are in that file.",
)
@click.option("--recommended", is_flag=True, help="Apply the ignored layers recommended for this model family.")
@click.option("--runtime", type=click.Choice(RUNTIMES), help="Whose layer scope to obey. Default: the dialect's.")
@click.option(
    "--moments",
    type=click.Path(path_type=Path),
    multiple=True,
    help="File of second moments for --rounding; repeatable.",
)
@click.option("--imatrix", type=click.Path(path_type=Path), help="Importance matrix of llama.cpp, with gguf.")
@click.option(
    "--rounding",
    type=click.Choice(ROUNDINGS),
    help="Rounding of weights. Default: auto with --moments, and up to 6 bits with statistics; else nearest.",
)
@click.option(
    "--bf16-blocks",
    type=click.IntRange(0),
    help="Leading blocks kept in BF16. Default: 5 for Wan with mxfp4_dualscale, else 0.",
)
@click.option("--force", is_flag=True, help="Override a refusal that names this option.")
@click.option(
    "--lora", multiple=True, metavar="[NAME=]FILE[:SCALE]", help="Bake this LoRA in, into component NAME; repeatable."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Recast unquantized floats; default: keep.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@memory_option
@engine_option
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--workers", type=int, metavar="N", help="Number of threads. Default: one per core.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--verify-source", is_flag=True, help="Record the SHA-256 of every source file in the manifest.")
@click.option(
    "--keep-source",
    is_flag=True,
    help="Download all of a Hub model and keep it; implied by --calib, --calibration and --engine ray.",
)
@click.option("--push-to-hub", metavar="REPO_ID", help="Upload the result to the Hub.")
@click.option("--private", is_flag=True, help="With --push-to-hub: make the repository private.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@report_option
@click.option("--quiet", is_flag=True, help="No progress, no table.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def convert_command(
    model: str | None,
    output: str | None,
    dry_run: bool,
    report_file: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL and write the result.

    MODEL is a diffusers folder, a Hub repo id, a component folder, or a .safetensors or .gguf file. Without MODEL, the
    bundled demo pipeline is converted.
    """
    _convert(model, output, options, dry_run=dry_run, report_file=report_file, quiet=quiet, as_json=as_json)


@click.command("dequantize")
@click.argument("model", metavar="PATH")
@click.option("-o", "--output", help="Folder, or a URL for fsspec. Default: ./<model name>-dequantized.")
@click.option("--config", metavar="FILE|REPO_ID", help="Config of a single file that has none beside it.")
@click.option(
    "--component",
    multiple=True,
    metavar="NAME=none|FILE",
    help="A component to leave as it is; or the file with its weights, which becomes part of the pipeline.",
)
@click.option(
    "--lora", multiple=True, metavar="[NAME=]FILE[:SCALE]", help="Bake this LoRA in, into component NAME; repeatable."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the result. Default: bfloat16 for dequantized layers; other tensors keep theirs.",
)
@click.option("--force", is_flag=True, help="Leave out what a LoRA file holds for layers that the model lacks.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--workers", type=int, metavar="N", help="Number of threads. Default: one per core.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def dequantize_command(
    model: str, output: str | None, dry_run: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Turn the quantized model at PATH back into BF16.

    The model may come from any tool whose files `inspect` can read.
    """
    options = {"method": "dequantize", "ignored_layers": (), "calib": None, **options}
    _convert(model, output, options, dry_run=dry_run, quiet=quiet, as_json=as_json)


@click.command("push")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Create a private repository.")
@click.option("--revision", help="Branch to upload to; default: main.")
@click.option("--quiet", is_flag=True, help="No progress.")
def push_command(path: Path, repo_id: str, private: bool, revision: str | None, quiet: bool) -> None:
    """Upload PATH, a finished conversion, to the Hub.

    The repository is created if it does not exist, and shows the model only when all files have arrived. After an
    interruption, the same command uploads the missing files.
    """
    from omni_convert.convert.output.upload import push_to_hub

    quieten_hub(hide_bars=quiet)
    click.echo(push_to_hub(path, repo_id, private=private, revision=revision))


def _convert(
    model: str | None,
    output: str | None,
    options: dict[str, Any],
    *,
    dry_run: bool,
    report_file: Path | None = None,
    quiet: bool,
    as_json: bool,
) -> None:
    if model is not None and not dry_run:
        start_reading(Path(model))  # first of all: the checks of a recipe import torch
    recipe = recipe_of(model, options)
    announce_demo(model, "converting", quiet=quiet or as_json)
    quieten_hub(hide_bars=quiet or as_json)
    from omni_convert.convert.conversion import Conversion
    from omni_convert.convert.report import conversion_report, plan_report

    conversion = Conversion.prepare(model, output, recipe, dry_run=dry_run)
    if dry_run:
        print_lines(plan_report(conversion.plan, as_json=as_json))
        return
    if recipe.calib is not None:
        silence_libraries()
    conversion.calibrate()
    for note in () if quiet or as_json else (*conversion.plan.notes, *conversion.growth):
        click.echo(f"Note: {note}", err=True)
    with (
        _told_how_to_resume(conversion.target),
        progress_bar("converting", conversion.plan.bytes_to_do, hidden=quiet) as advance,
    ):
        report = conversion.execute(advance)
    for warning in report.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if report_file is not None:
        from omni_convert.convert.page.document import write_page
        from omni_convert.convert.page.pages import conversion_page

        write_page(report_file, conversion_page(conversion.plan, report, conversion.mixture, command_line()))
    if as_json or not quiet:
        print_lines(conversion_report(report, as_json=as_json))
    address = conversion.push()
    if address is not None:
        click.echo(address, err=quiet or as_json)


@contextmanager
def _told_how_to_resume(target: Destination) -> Iterator[None]:
    """Prints after an interruption where the finished part of the work is."""
    try:
        yield
    except KeyboardInterrupt:
        if target.work.exists():
            click.echo(f"{target.work} holds the finished work; --resume continues from there", err=True)
        raise
