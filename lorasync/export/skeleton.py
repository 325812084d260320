"""A base model and an adapter's layers without storage, to learn names and shapes from."""

from __future__ import annotations

import copy
import json
import warnings
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import LoadError, Mismatch
from lorasync.export.config import adapter_config, merged_config, read_json, say_tied
from lorasync.model_class import class_of_name

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
    kind: Any = class_of_name(made.get("architectures"))
    if kind is None:
        known = made.pop("model_type", None)
        if known is None:
            raise LoadError("config.json: got no architectures and no model_type, expected a model's config.")
        config_class = type(transformers.AutoConfig.for_model(known))
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
        if kind is None:
            raise LoadError(
                f"config.json: got {(made.get('architectures') or [known])[0]}, which this transformers doesn't know."
            )
    return kind, kind.config_class.from_dict(made)


def misplaced(model: Any, factors: Tensors) -> Iterator[Mismatch]:
    """Compare the names and shapes of an adapter's file with what its config makes of the model.

    Args:
        model: A PEFT model; the meta device will do.
        factors: The adapter's file.
    """
    made = _adapter_state(model)
    beside = saved_beside(model, factors)
    for name in sorted(made.keys() ^ set(factors.names)):
        if name in made:
            yield Mismatch(name, "nothing", "a tensor", _FIX)
        elif name not in beside:
            yield Mismatch(name, "a tensor", "none of this name", _FIX)
    for name in made.keys() & set(factors.names):
        shape, expected = factors.describe(name)[1], tuple(made[name].shape)
        if shape != expected:
            yield Mismatch(name, str(shape), str(expected), _FIX)


def saved_beside(model: Any, factors: Tensors) -> list[str]:
    """Name the whole embeddings in an adapter's file: PEFT saves them along when they are targeted, or were resized."""
    paths = [path for path, _ in embeddings(model)]
    ends = [f"{path}.{end}" for path in paths for end in ("weight", "base_layer.weight")]
    made = _adapter_state(model)
    return [name for name in ends if name in factors and name not in made]


def embeddings(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield path and weight of the input and the output embedding."""
    for which in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model.base_model.model, which, None)
        layer = get() if get is not None else None
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
        path = next((name for name, module in model.named_modules() if module is layer), None)
        if weight is not None and path is not None:
            yield path, weight


def _adapter_state(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return made


def _line(error: BaseException) -> str:
    return json.dumps(f"{type(error).__name__}: {error}"[:300])[1:-1]
