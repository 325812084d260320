"""``zero_optimization`` as DeepSpeed reads it: every field under its own name, whichever alias was written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, get_args

from lorasync.errors import ZeroIncompatibilityError
from lorasync.zero.keys import ALIASES, SECTIONS, ZERO, Path

_TRUE = ("true", "yes", "on", "y", "t", "1", "1.0")
_FALSE = ("false", "no", "off", "n", "f", "0", "0.0")
_OFFLOADED = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_FLAGS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "use_all_reduce_for_fetch_params")


@cache
def deepspeed_model() -> Any:
    """Return DeepSpeed's own config model; None where DeepSpeed isn't installed, or can't be imported."""
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except Exception:  # absent, or what a broken compiler setup makes of its import
        return None
    return DeepSpeedZeroConfig


def known_keys() -> dict[Path, frozenset[str]]:
    """Return the keys of every section: of those that DeepSpeed validates, what the installed release takes."""
    model = deepspeed_model()
    if model is None:
        return SECTIONS
    nested: dict[Path, Any] = {
        (ZERO, name): _nested(field.annotation) for name, field in model.model_fields.items()
    }
    asked: dict[Path, Any] = {(ZERO,): model, **nested, **_precision_models()}
    return {**SECTIONS, **{path: _names(found) for path, found in asked.items() if found is not None}}


def _precision_models() -> dict[Path, Any]:
    """Return the models of fp16 and bf16: DeepSpeed has them since 0.17."""
    try:
        module = import_module("deepspeed.runtime.precision_config")
    except ImportError:
        return {}
    fp16, bf16 = (getattr(module, f"DeepSpeed{kind}Config", None) for kind in ("FP16", "BF16"))
    return {("fp16",): fp16, ("bf16",): bf16, ("bfloat16",): bf16}


def _nested(annotation: Any) -> Any:
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if hasattr(kind, "model_fields")), None)


def _names(model: Any) -> frozenset[str]:
    fields = model.model_fields
    return frozenset(fields) | frozenset(f.alias for f in fields.values() if f.alias is not None)


def aliases() -> dict[str, str]:
    """Return the fields that have a second name, with it."""
    model = deepspeed_model()
    if model is None:
        return ALIASES
    return {name: str(f.alias) for name, f in model.model_fields.items() if f.alias not in (None, name)}


def twice(section: Mapping[str, Any]) -> list[str]:
    """Say which settings are there under both of their names: DeepSpeed refuses that, even with one value."""
    return [
        f"{ZERO}: got both {name}={section[name]!r} and {alias}={section[alias]!r}, expected one: they are two names of the "
        "same setting, and DeepSpeed refuses both together. Remove one."
        for name, alias in aliases().items()
        if name in section and alias in section
    ]


def read_section(section: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read ``zero_optimization`` into its fields; what is "auto" is left out, as DeepSpeed does.

    Args:
        section: What the config has there.
        source: Where the config came from, for messages.

    Raises:
        ZeroIncompatibilityError: DeepSpeed refuses a value.
    """
    given = _without_auto(section)
    model = deepspeed_model()
    if model is None:
        return _by_table(given, source)
    try:
        with _quiet():
            made = model(**given)
    except Exception as error:  # pydantic's, asserts and TypeErrors alike
        raise ZeroIncompatibilityError(
            f"{ZERO}: got values in {source} that DeepSpeed refuses ({_said(error)}), expected others. Correct the config."
        ) from error
    return {name: _plain(getattr(made, name)) for name in model.model_fields if hasattr(made, name)}


def flag(key: str, value: Any) -> bool:
    """Read a flag as pydantic, and so DeepSpeed, does: true, 1, "true", "yes" and so on.

    Raises:
        ZeroIncompatibilityError: It is no flag.
    """
    text = str(value).lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ZeroIncompatibilityError(f"{key}: got {value!r}, expected true or false. Correct the config.")


def _by_table(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read what the guard needs without DeepSpeed."""
    own = {alias: name for name, alias in ALIASES.items()}
    fields = {own.get(key, key): value for key, value in given.items()}
    for old, new in _OFFLOADED.items():
        value = fields.pop(old, None)
        if value is not None and flag(f"{ZERO}.{old}", value):
            _refuse_two_offloads(old, new, fields)
            fields[new] = {"device": "cpu"}
    for key in _FLAGS:
        fields[key] = flag(f"{ZERO}.{key}", fields.get(key, False))
    for key in _OFFLOADED.values():
        _check_device(key, fields.get(key), source)
    return fields


def _refuse_two_offloads(old: str, new: str, fields: Mapping[str, Any]) -> None:
    if new in fields:
        raise ZeroIncompatibilityError(
            f"{ZERO}: got both {old} and {new}, expected one: {old} is the deprecated name. Remove it."
        )


def _check_device(key: str, section: Any, source: str) -> None:
    device = section.get("device", "none") if isinstance(section, Mapping) else section
    if device not in (None, "none", "cpu", "nvme"):
        raise ZeroIncompatibilityError(
            f'{ZERO}.{key}: got {device!r} in {source}, expected a section with the device "none", "cpu" or "nvme". Correct '
            "the config."
        )


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: _without_auto(v) if isinstance(v, Mapping) else v for key, v in section.items()}
    return {key: value for key, value in plain.items() if not (isinstance(value, str) and value == "auto")}


def _plain(value: Any) -> Any:
    """Turn a nested model into a dict, and an enum's member into its value."""
    fields = getattr(type(value), "model_fields", None)
    if fields is None:
        return getattr(value, "value", value)
    return {name: _plain(getattr(value, name)) for name in fields if hasattr(value, name)}


def _said(error: Any) -> str:
    """Return what DeepSpeed says, on one line, without pydantic's frame."""
    details = error.errors() if callable(getattr(error, "errors", None)) else []
    said = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in details]
    return "; ".join(said) or (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence DeepSpeed's warnings about a config: they belong to the run, not to each time that we read it."""
    logger = logging.getLogger("DeepSpeed")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was
