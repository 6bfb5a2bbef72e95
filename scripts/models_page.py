"""Writes the page of models: what is quantized of each family, what stays and why, and who runs which method.

    python scripts/models_page.py            writes formats/families/MODELS.md
    python scripts/models_page.py --check    fails if the page is another

Everything on it comes from the tables in formats/families and from the record of scripts/vllm_omni_grid.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import COMFYUI, DIFFUSERS, VLLM_OMNI, LayerPattern
from omni_convert.formats.families.table import FAMILIES
from omni_convert.formats.options import DIALECT_OF_METHOD, DIALECTS_OF_METHOD
from omni_convert.formats.table import FORMATS, build_format

__all__ = ["COMMAND", "PAGE", "RECORD", "page", "result_lines"]

COMMAND = "python scripts/models_page.py"
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "formats" / "families" / "MODELS.md"
RECORD = ROOT / "scripts" / "vllm_omni_grid.json"
METHODS = tuple(method for method in FORMATS if method != "fp8_storage")
NAMES = {VLLM_OMNI: "vLLM-Omni", DIFFUSERS: "our loader", COMFYUI: "ComfyUI"}
#: Runtime to the dialects in which conversions write for it.
DIALECTS_OF = {
    VLLM_OMNI: ("vllm-omni", "modelopt", "auto-round"),
    DIFFUSERS: ("vllm-omni", "auto-round"),
    COMFYUI: ("comfyui",),
}
#: Shape of a layer that every format holds.
LAYER = (512, 512)

Record = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]

HEAD = f"""# Models

Written by `{COMMAND}` from the tables in this folder and from the record of
[`scripts/vllm_omni_grid.py`](../../scripts/vllm_omni_grid.py); a test compares it with them.

`N` stands for a number. Layers that are not named stay as they are: embedders, modulation, norms, final projections.
"""
RESULTS = """## What vLLM-Omni loads

Tiny models of diffusers' classes were converted, and loaded by vLLM-Omni's own config, model class and weight loader
on a CPU. A number is the worst relative error of a weight in vLLM-Omni's memory against the source. Every layer holds
there what was written; nothing was left unloaded, and nothing left over. Kernels were not run. The weights have heavy
tails on purpose. AutoRound's MXFP4 is loaded by 0.30.0 too, but has no kernel there for the inputs of these models.

Of Qwen3-Omni and Qwen2.5-Omni, this is the language model of the thinker, of Qwen3-TTS the whole talker. Their configs
went through vLLM-Omni's own architecture convertor. Experts in W4A16 are loaded by the method that calls Marlin on a
GPU. HunyuanImage-3.0, BAGEL and LTX-2 without video are held to their classes by tests, which `scripts/nightly` runs.
"""


def page(record: Record) -> str:
    """The text of the page."""
    families = (line for family in FAMILIES for line in family_lines(family))
    return "\n".join([HEAD, RESULTS, *result_lines(record), "", *families]).rstrip() + "\n"


def result_lines(record: Record) -> Iterator[str]:
    """The record as tables of models and methods, and the reasons for what is not accepted."""
    methods = list(dict.fromkeys(method for models in record.values() for cells in models.values() for method in cells))
    own = [method for method in methods if "'s " not in method]
    others = [method for method in methods if method not in own]
    models = list(dict.fromkeys(name for cells in record.values() for name in cells))
    versions = " and ".join(record)
    yield f"Versions are {versions}. One in brackets is the only one that loads the file; a dash means that none does."
    for columns in (own, others):
        yield ""
        yield f"| model | {' | '.join(columns)} |"
        yield f"|---{'|---' * len(columns)}|"
        for name in models:
            cells = [
                _cell({version: record[version][name].get(method, {}) for version in record}) for method in columns
            ]
            yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""
    yield from _reasons(record)


def _cell(results: Mapping[str, Mapping[str, Any]]) -> str:
    errors = {version: result["error"] for version, result in results.items() if "error" in result}
    if not errors:
        return "-"
    shown = max(errors.values())
    return shown if len(errors) == len(results) else f"{shown} ({', '.join(errors)})"


def _reasons(record: Record) -> Iterator[str]:
    """One line for each reason: of which version, models and methods it is."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for version, models in record.items():
        for name, cells in models.items():
            for method, result in cells.items():
                if "error" not in result:
                    ((what, why),) = result.items()
                    where = "omni-convert refuses" if what == "refused" else f"vLLM-Omni {version}"
                    methods = found.setdefault((where, why), {}).setdefault(name, [])
                    methods += [method] if method not in methods else []
    count = max(len(cells) for models in record.values() for cells in models.values())
    for (where, why), by_model in found.items():
        same = groupby(sorted(by_model, key=lambda name: by_model[name]), key=lambda name: by_model[name])
        places = "; ".join(f"{_codes(names)} with {_listed(methods, count)}" for methods, names in same)
        yield f"- {where}: {places}: {why}"


def _listed(methods: Sequence[str], count: int) -> str:
    return "every method" if len(methods) == count else ", ".join(methods)


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def family_lines(family: Family) -> Iterator[str]:
    """The section of a family."""
    yield f"## {family.name}"
    yield ""
    yield f"Classes: {_codes(family.model_classes)}."
    yield ""
    yield from (f"- {line}" for line in _facts(family))
    yield ""


def _facts(family: Family) -> Iterator[str]:
    yield from _layer_facts(family)
    encoder = family.shared_encoder
    if encoder is not None:
        kinds = f" ({_codes(encoder.model_types)})" if encoder.model_types else ""
        why = f"; it stays: {encoder.stays}" if encoder.stays else ""
        yield f"**Text encoder{kinds}:** vLLM-Omni builds it from the transformer's block, which lists its linears{why}"
    for advice in family.recommendations:
        methods = f" with {_codes(advice.methods)}" if advice.methods else ""
        yield f"**Recommended{methods}:** `--ignored-layers {advice.pattern}`: {advice.reason}"
    for method, count in family.leading_blocks:
        yield f"**Blocks:** the first {count} stay in BF16 with `{method}`"
    for variant in family.refused_variants:
        where = f"`{variant.config_key}` {variant.config_value}"
        yield f"**Refused** where {where}, with {_codes(variant.methods)}: {variant.reason}"
    for pattern, reason in family.refused_layers:
        yield f"**Refused** with a layer `{pattern.replace('{}', 'N')}`: {reason}"
    for note in family.method_notes:
        methods = f" for {_codes(note.methods)}" if note.methods else ""
        yield f"**Note{methods}:** {note.text}"
    yield from _method_facts(family)


def _layer_facts(family: Family) -> Iterator[str]:
    if not family.layers:
        if not any(refusal.is_final for refusal in family.refusals):
            yield "**Quantized:** linears in blocks, by the generic rule"
        return
    in_runtime = [each for each in family.layers if VLLM_OMNI in each.runtimes]
    kept = [each for each in in_runtime if each.keep_reason is not None]
    quantized = [each for each in in_runtime if each.keep_reason is None]
    for scope, built in groupby(quantized, key=_scope):
        yield f"**Quantized{scope}:** {_layers(list(built))}"
    others = [each for each in family.layers if VLLM_OMNI not in each.runtimes]
    if others:
        otherwise = "Otherwise not" if any(map(_scope, quantized)) else "Not"
        yield f"**{otherwise} built quantized by vLLM-Omni, so only for {_others(others)}:** {_layers(others)}"
    for reason, patterns in groupby(kept, key=lambda each: each.keep_reason):
        yield f"**Kept:** {_layers(list(patterns))}: {reason}"
    if family.stage is not None:
        ignored = f", which ignores {_codes(family.stage.ignored)}" if family.stage.ignored else ""
        place = ".".join((*family.stage.config_path, "quantization_config"))
        yield f"**Other stages stay.** The block stands in `{place}`{ignored}"


def _scope(pattern: LayerPattern) -> str:
    """The methods or dialects with which alone the runtime builds a layer quantized, for a heading."""
    only = f" with {_codes(pattern.methods)} alone" if pattern.methods else ""
    return f"{only} in {_codes(pattern.dialects)} alone" if pattern.dialects else only


def _others(patterns: Sequence[LayerPattern]) -> str:
    return " and ".join(NAMES[runtime] for runtime in patterns[0].runtimes)


def _layers(patterns: Sequence[LayerPattern]) -> str:
    """Layers, those of one parent together; merged ones with the name that they have in the runtime."""
    shown = []
    for parent, group in groupby(patterns, key=lambda each: "" if len(each.members) > 1 else _parent(each)):
        if parent:
            shown.append(_braces(parent, [_leaf(each.members[0]) for each in group]))
        else:
            shown += [f"{_merged(each)} (as `{_leaf(each.runtime_name)}`)" for each in group]
    return ", ".join(shown)


def _merged(pattern: LayerPattern) -> str:
    return _braces(_parent(pattern), [_leaf(member) for member in pattern.members])


def _parent(pattern: LayerPattern) -> str:
    """What the names of the members have in common, with its dot."""
    parents = {member.rpartition(".")[0] for member in pattern.members}
    return f"{parents.pop()}." if len(parents) == 1 and all(parents) else ""


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _braces(parent: str, leaves: Sequence[str]) -> str:
    leaf = leaves[0] if len(leaves) == 1 else f"{{{', '.join(leaves)}}}"
    return f"`{parent}{leaf}`".replace("{}", "N")


def _method_facts(family: Family) -> Iterator[str]:
    for runtime, name in NAMES.items():
        accepted = [method for method in METHODS if _is_run(family, runtime, method)]
        if accepted:
            yield f"**{name}:** {_codes(accepted)}"
    for refusal in family.refusals:
        where = f"**{NAMES[refusal.runtime]} refuses**"
        what = f" {_codes(refusal.methods)}" if refusal.methods else ""
        dialects = f" in {_codes(refusal.dialects)}" if refusal.dialects else ""
        yield f"{where}{what}{dialects}: {refusal.reason}"
    if family.gguf.architecture != "diffusion":
        yield f"**GGUF:** architecture `{family.gguf.architecture}`"


def _is_run(family: Family, runtime: str, method: str) -> bool:
    """Whether a runtime loads a method in a dialect that conversions write for it."""
    if method == "gguf":
        return runtime == VLLM_OMNI and family.gguf.has_vllm_adapter
    dialects = DIALECTS_OF[runtime]
    return any(_holds(name, method) and family.refusal(runtime, method, name) is None for name in dialects)


def _holds(dialect: str, method: str) -> bool:
    """Whether the dialect spells the method, and is not one that hands it to another."""
    if dialect == "vllm-omni" and method in (*DIALECT_OF_METHOD, *DIALECTS_OF_METHOD):
        return False
    formats = (build_format(method), build_format(method, static=True))
    return any(not isinstance(DIALECTS[dialect].spelling(each, LAYER), str) for each in formats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    text = page(json.loads(RECORD.read_text()))
    if not arguments.check:
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        print(f"{PAGE}: found another text than the tables give; run {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
