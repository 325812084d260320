"""The guard: model and training config in, findings out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import LoadError, ZeroIncompatibilityError
from lorasync.zero.facts import ZeroPlan, read_facts
from lorasync.zero.report import Versions, ZeroReport, by_severity
from lorasync.zero.rules import RULES, Case
from lorasync.zero.settings import Fsdp2, read_settings

if TYPE_CHECKING:
    from lorasync.presets.quantization import QuantPreset


def inspect_zero(model: Any, ds_config: Any = None, *, versions: Versions | None = None) -> ZeroReport:
    """Judge whether a model and a training config work together, and say why not.

    Args:
        model: a model (before ``deepspeed.initialize``), a DeepSpeed engine (after it), or a `ZeroPlan`
            (before anything is loaded). Nothing is changed, moved or gathered.
        ds_config: a DeepSpeed config as a dict or the path of a JSON file, an `HfDeepSpeedConfig`,
            `TrainingArguments`, accelerate's `DeepSpeedPlugin` or `FullyShardedDataParallelPlugin`, or
            `Fsdp2()`.
            None: the engine's own config, or FSDP2 where the model is sharded by it.
        versions: the versions to judge for; by default those of this environment.

    Raises:
        ZeroIncompatibilityError: ``ds_config`` can't be read.

    Example:
        >>> model = torch.nn.Linear(4, 4)
        >>> inspect_zero(model, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}).ok
        True
    """
    facts = read_facts(model)
    settings = read_settings(_default_config(model, facts.fsdp) if ds_config is None else ds_config)
    if facts.fsdp:
        settings = replace(settings, framework="fsdp2")
    judged = Versions.installed() if versions is None else versions
    case = Case(facts, settings, judged)
    findings = [finding for rule in RULES for finding in rule(case)]
    return ZeroReport(facts.subject, settings.source, by_severity(findings), judged)


def check_zero(model: Any, ds_config: Any = None, *, versions: Versions | None = None) -> ZeroReport:
    """Raise if a model and a training config don't work together; return the report if they do.

    Args:
        model: see `inspect_zero`.
        ds_config: see `inspect_zero`.
        versions: see `inspect_zero`.

    Raises:
        ZeroIncompatibilityError: the report has errors; each comes with key, value, reason and fix, and
            ``report`` holds the warnings and notes too.

    Example:
        >>> check_zero(torch.nn.Linear(4, 4), {"zero_optimization": {"stage": 3}}).ok
        True
    """
    report = inspect_zero(model, ds_config, versions=versions)
    if not report.ok:
        raise ZeroIncompatibilityError(str(report), report)
    return report


def inspect_path(
    model: str, ds_config: str, *, preset: QuantPreset | None = None, lora: Any = None
) -> ZeroReport:
    """Judge a checkpoint that is not loaded, for ``lorasync check-zero MODEL DS_CONFIG``.

    Args:
        model: a model directory, an adapter directory or a hub id; only its config is read. A checkpoint that
            bitsandbytes quantized is judged as such.
        ds_config: the path of a DeepSpeed config.
        preset: how it will be quantized; None if it won't be.
        lora: the `peft.LoraConfig`; by default one on all linear layers (an adapter directory brings its
            own).

    Raises:
        LoadError: no config can be read at ``model``.
        ZeroIncompatibilityError: ``ds_config`` can't be read.
    """
    from transformers import AutoConfig

    settings = read_settings(ds_config)
    base, found = _adapter(model)
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{base}: got no readable config.json ({str(error).strip().splitlines()[0]}), expected a model "
            "directory or a hub id. Check the spelling."
        ) from error
    dtype = settings.engine_dtype if settings.engine_dtype is not None else torch.bfloat16
    adapter = lora if lora is not None else found if found is not None else _all_linear()
    return inspect_zero(ZeroPlan(config, quantization=preset, lora=adapter, dtype=dtype), settings)


def _default_config(model: Any, fsdp: bool) -> Any:
    if fsdp:
        return Fsdp2()
    if hasattr(model, "zero_optimization_stage"):
        return model
    raise ZeroIncompatibilityError(
        "ds_config: got nothing, expected a DeepSpeed config: only an engine or an FSDP2 model carries its "
        "own."
    )


def _adapter(path: str) -> tuple[str, Any]:
    if not (Path(path) / "adapter_config.json").is_file():
        return path, None
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(path)
    return str(config.base_model_name_or_path), config


def _all_linear() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
