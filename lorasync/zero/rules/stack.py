"""Rules about the config's keys and the installed releases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasync.zero.report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.zero.rules.case import Case

_MANY_DTYPES_SINCE = "0.12.3"  # DeepSpeed #4647: ZeRO-3 gathers parameters of several dtypes
_PARAM_CAST_SINCE = (
    "0.19.2"  # DeepSpeed #8066: casts parameters itself; before, module.half() or module.bfloat16()
)
_MOVE_4BIT_SINCE = "4.45.0"  # transformers #33122: a 4-bit model may be moved
_MOVE_8BIT_SINCE = "0.48.0"  # bitsandbytes, asked for by transformers 5


def ignored_keys(case: Case) -> Iterator[Finding]:
    """DeepSpeed ignores keys that it doesn't know; misspelt keys are refused before any rule is asked."""
    for unknown in case.config.ignored:
        yield Finding(
            "ignored-key",
            "warning",
            unknown.key,
            "set",
            "DeepSpeed has no such key and ignores it without a word.",
            "Remove it, or put an underscore in front if it is a remark.",
        )


def auto_precision(case: Case) -> Iterator[Finding]:
    """With a precision of "auto" the engine's dtype is not known yet."""
    if case.config.engine_dtype is None:
        yield Finding(
            "auto-precision",
            "warning",
            "bf16.enabled / fp16.enabled",
            "auto",
            "the engine's dtype is not known yet, so nothing could be judged that depends on it.",
            "Pass the TrainingArguments instead of the raw config, or write true or false.",
        )


def old_stack(case: Case) -> Iterator[Finding]:
    """Some combinations fail on older releases of the libraries, and work on newer ones."""
    if not case.model.quantized or case.config.framework != "deepspeed" or case.model.initialized:
        return
    bare = not case.model.wrapped  # in a PeftModel nobody calls the inner model's own to() or half()
    if bare and case.versions.older("transformers", _MOVE_4BIT_SINCE):
        yield _old(
            "transformers",
            case.versions.transformers,
            _MOVE_4BIT_SINCE,
            "refuses to move quantized models, and deepspeed.initialize moves the model",
            "`.to` is not supported for `4-bit` or `8-bit` models",
        )
    if bare and case.model.bits == 8 and case.versions.older("bitsandbytes", _MOVE_8BIT_SINCE):
        yield _old(
            "bitsandbytes",
            case.versions.bitsandbytes,
            _MOVE_8BIT_SINCE,
            "can't move 8-bit models, and deepspeed.initialize moves the model",
            "`.to` is not supported for `4-bit` or `8-bit` models",
        )
    halved = bare and case.config.engine_dtype == torch.float16
    if halved and case.versions.older("deepspeed", _PARAM_CAST_SINCE):
        yield _old(
            "deepspeed",
            case.versions.deepspeed,
            _PARAM_CAST_SINCE,
            "calls model.half(), which transformers refuses for quantized models",
            "`.half()` is not supported for quantized model",
        )
    if case.config.stage == 3 and case.versions.older("deepspeed", _MANY_DTYPES_SINCE):
        yield _old(
            "deepspeed",
            case.versions.deepspeed,
            _MANY_DTYPES_SINCE,
            "gathers parameters of one dtype only under ZeRO-3, and packed weights have another",
            "expected there to be only one unique element",
        )


def _old(library: str, found: str | None, since: str, what: str, symptom: str) -> Finding:
    return Finding(
        "old-stack",
        "error",
        library,
        str(found),
        f"this release {what}.",
        f"pip install -U '{library}>={since}'",
        symptom,
    )
