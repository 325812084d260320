"""A base model and an adapter's layers without storage, to learn names and shapes from."""

from __future__ import annotations

import copy
import json
import warnings
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import LoadError, Mismatch
from lorasync.export.config import adapter_config, merged_config, read_json, say_tied

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lorasync.export.tensors import Tensors

_FIX = "Is the adapter for this base? Else load both with PEFT and pass the model to merge_to_disk."


def skeleton(base: Path, adapter: Path, *, tied: bool | None = None) -> Any:
    """Build the PEFT model of a base folder and an adapter folder on the meta device.

    Args:
        base: The base's folder.
        adapter: The adapter's folder.
        tied: Whether output layer and embedding are one, where the config is wrong about it.

    Raises:
        LoadError: One of the folders has no readable config, or the adapter doesn't fit the model.
    """
    from peft import get_peft_model

    settings = adapter_config(adapter)
    changing = getattr(settings, "init_lora_weights", None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if changing is not None:
            settings.init_lora_weights = False
        settings.inference_mode = False
        model = _plain_model(base, tied)
        try:
            peft = get_peft_model(model, settings, low_cpu_mem_usage=True)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise LoadError(
                f"{adapter}: got {_line(error)}, expected an adapter for {base}. {_FIX}"
            ) from error
    if changing is not None:
        settings.init_lora_weights = changing
    return peft


def _plain_model(base: Path, tied: bool | None) -> Any:
    written = merged_config(read_json(base / "config.json"), packed=torch.bfloat16)
    if tied is not None:
        say_tied(written, tied)
    try:
        kind, config = model_class(written)
        return kind._from_config(config)
    except Exception as error:  # whatever a constructor says to a config that it doesn't like
        raise LoadError(
            f"{base}: got {_line(error)}, expected the config of a model that this transformers builds."
        ) from error


def model_class(config: dict[str, Any]) -> tuple[Any, Any]:
    """Find the class that a config names, and the config as its object.

    Raises:
        LoadError: This transformers has no such class.
    """
    import transformers

    made = copy.deepcopy(config)
    name = (made.get("architectures") or [""])[0]
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        known = made.pop("model_type", None)
        if known is None:
            raise LoadError("config.json: got no architectures and no model_type, expected a model's config.")
        config_class = type(transformers.AutoConfig.for_model(known))
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
        if kind is None:
            raise LoadError(f"config.json: got {name or known}, which this transformers doesn't know.")
    return kind, kind.config_class.from_dict(made)


def misplaced(model: Any, factors: Tensors) -> Iterator[Mismatch]:
    """Compare the names and shapes of an adapter's file with what its config makes of the model.

    Args:
        model: A PEFT model; the meta device will do.
        factors: The adapter's file.
    """
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(made.keys() ^ set(factors.names)):
        if name in made:
            yield Mismatch(name, "nothing", "a tensor", _FIX)
        elif not name.endswith("base_layer.weight"):  # a frozen embedding that PEFT saved along
            yield Mismatch(name, "a tensor", "none of this name", _FIX)
    for name in made.keys() & set(factors.names):
        shape, expected = factors.describe(name)[1], tuple(made[name].shape)
        if shape != expected:
            yield Mismatch(name, str(shape), str(expected), _FIX)


def _line(error: BaseException) -> str:
    return json.dumps(f"{type(error).__name__}: {error}"[:300])[1:-1]
