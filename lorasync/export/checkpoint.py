"""Merging two folders, a base checkpoint and an adapter, without ever holding a model: tensor by tensor."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorasync.errors import LoadError, Mismatch, MismatchError, NonFiniteError
from lorasync.export.writer import DTYPES
from lorasync.kernels import dequantize_4bit
from lorasync.merge import (
    NEAREST,
    Nearest,
    Rounding,
    Scratch,
    low_rank_delta,
    merge_and_round,
    merge_low_rank,
    replace_rows,
)
from lorasync.names import CheckpointLayout
from lorasync.source import FactorModule, FactorSource, FactorSpec, ParamMeta

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATE = ".quant_state.bitsandbytes__"


class Tensors:
    """The tensors of one folder's safetensors files, read one at a time.

    Raises:
        LoadError: There are no safetensors files, or the index names a file that is missing.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = [f"{stem}.safetensors"]
        missing = [file for file in files if not (folder / file).exists()]
        if missing:
            raise LoadError(
                f"{folder}: got no {', '.join(missing)}, expected safetensors files of a complete save."
            )
        self._open: list[Any] = [safe_open(folder / file, framework="pt") for file in files]
        self._where = {name: handle for handle in self._open for name in handle.keys()}  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        """Every tensor's name, file by file."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor into memory of its own."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape; nothing is read."""
        view = self._where[name].get_slice(name)
        return DTYPES[view.get_dtype()], tuple(view.get_shape())


class CheckpointSource:
    """The merged checkpoint of a base and an adapter folder, as a stream in the base's names and order.

    Args:
        base: A model folder with safetensors, plain or packed by bitsandbytes (4-bit or 8-bit).
        adapter: A PEFT folder (adapter_config.json, adapter_model.safetensors) of a LoRA or DoRA.
        dtype: What floating-point weights become; ``None`` keeps each one's own.
        rounding: How to round what was merged.
        untie: Write tied weights apart where the adapter makes them differ.

    Raises:
        LoadError: A folder is not what it should be.
        MismatchError: The adapter is not for this base; every mismatch is named.
        UnmergeableError: The adapter is no LoRA.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path,
        *,
        dtype: torch.dtype | None = None,
        rounding: Rounding = NEAREST,
        untie: bool = False,
    ) -> None:
        self.base, self.factors = Tensors(base, "model"), Tensors(adapter, "adapter_model")
        self.dtype, self.rounding, self.untie = dtype, rounding, untie
        self._model = skeleton(base, adapter)
        self.spec: FactorSpec = FactorSource(self._model).spec()
        self._int8_dtype = _dtype_of(base)
        self._names = [name for name in self.base.names if not _is_companion(name)]
        self._modules = _by_weight(self.spec.modules)
        self._check()

    def metadata(self) -> list[ParamMeta]:
        """Say what iteration will yield; nothing is read."""
        known = [ParamMeta(name, *self._describe(name)) for name in self._names]
        return known + [ParamMeta(name, *self._described(like)) for name, like in self._added().items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, tensor)`; NaN and Inf are looked for in all factors first, then in each result."""
        bad = [name for name in self.factors.names if not _finite(self.factors[name])]
        if bad:
            raise NonFiniteError(f"adapter: got NaN or Inf in {', '.join(bad)}, expected finite values.")
        scratch = Scratch()
        for name in [*self._names, *self._added()]:
            tensor = self._make(name, scratch)
            if not _finite(tensor):
                raise NonFiniteError(f"{name}: got NaN or Inf after merging, expected finite values.")
            yield name, tensor

    def _make(self, name: str, scratch: Scratch) -> Tensor:
        saved = {entry.weight: entry.tensor for entry in self.spec.saved}
        if name in saved:
            return self._cast(self.factors[saved[name]], name)
        base = self._read(name if name in self.base else self.spec.ties.get(name, name))
        modules = self._modules.get(name, [])
        if (
            len(modules) == 1
            and not modules[0].pieces
            and name not in {rows.weight for rows in self.spec.rows}
        ):
            return self._one_module(modules[0], name, base, scratch)
        return self._cast(self._merged(name, base), name)

    def _one_module(self, module: FactorModule, name: str, base: Tensor, scratch: Scratch) -> Tensor:
        """The usual case: one adapter, rounded as it is merged."""
        how = replace(module.how, exact=module.how.exact or self._packed(name))
        a, b = self.factors[module.a], self.factors[module.b]
        magnitude = None if module.magnitude is None else self.factors[module.magnitude]
        dtype, rounding = self._dtype_of(name), self.rounding
        return merge_and_round(
            how, base, a, b, magnitude, dtype=dtype, rounding=rounding, key=name, scratch=scratch
        )

    def _merged(self, name: str, base: Tensor) -> Tensor:
        weight = base
        for module in self._modules.get(name, ()):
            weight = self._low_rank(module, name, weight)
        for bias in self.spec.biases:
            if bias.weight == name:
                weight = weight + self.factors[bias.tensor] * bias.scaling
        for rows in self.spec.rows:
            if rows.weight == name:
                weight = replace_rows(weight, rows.rows, self.factors[rows.tensor])
        return weight

    def _low_rank(self, module: FactorModule, name: str, weight: Tensor) -> Tensor:
        exact = not isinstance(self.rounding, Nearest)
        how = replace(module.how, exact=module.how.exact or self._packed(name))
        a, b = self.factors[module.a], self.factors[module.b]
        if module.pieces:
            delta = self._delta_of_piece(module, name, low_rank_delta(how, a, b, exact=exact))
            return weight + (delta.to(weight.dtype) if how.cast_first and not exact else delta)
        magnitude = None if module.magnitude is None else self.factors[module.magnitude]
        return merge_low_rank(how, weight, a, b, magnitude, exact=exact)

    def _delta_of_piece(self, module: FactorModule, name: str, delta: Tensor) -> Tensor:
        """The part of a fused weight's delta that belongs to one piece: conversions only move elements."""
        layout = CheckpointLayout(self._model.base_model.model)
        return layout.convert({module.weight: delta})[name]

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        dtype = self._dtype_of(name)
        return self.rounding(tensor, dtype, key=name) if dtype.is_floating_point else tensor

    def _dtype_of(self, name: str) -> torch.dtype:
        return (self._describe(name) if name in self.base else self._described(name))[0]

    def _added(self) -> dict[str, str]:
        """Names that the base doesn't store but the merged model does: trained heads, untied weights."""
        names = [saved.weight for saved in self.spec.saved]
        if self.untie and self.spec.conflicts:
            names += list(self.spec.ties) + [name for name in self._modules if name in self.spec.ties]
        known = set(self._names)
        return {name: name for name in dict.fromkeys(names) if name not in known}

    def _described(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        for saved in self.spec.saved:
            if saved.weight == name:
                dtype, shape = self.factors.describe(saved.tensor)
                return self._target(dtype), shape
        return self._describe(self.spec.ties[name])

    def _describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        dtype, shape = self.base.describe(name)
        state = self._state(name)
        if state is not None:
            return self._target(state.dtype), tuple(state.shape)
        return self._target(self._int8_dtype if self._packed(name) else dtype), shape

    def _target(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _packed(self, name: str) -> bool:
        return self._scales(name) in self.base or self._state_key(name) is not None

    def _state_key(self, name: str) -> str | None:
        keys = (f"{name}{_STATE}{kind}" for kind in ("nf4", "fp4"))
        return next((key for key in keys if key in self.base), None)

    def _state(self, name: str) -> Any:
        key = self._state_key(name)
        if key is None:
            return None
        from bitsandbytes.functional import QuantState

        parts = {other: self.base[name + other] for other in _COMPANIONS if name + other in self.base}
        parts = {other.removeprefix("."): tensor for other, tensor in parts.items()}
        return QuantState.from_dict(
            {**parts, key.removeprefix(f"{name}."): self.base[key]}, torch.device("cpu")
        )

    def _scales(self, name: str) -> str:
        return f"{name.removesuffix('weight')}SCB"

    def _read(self, name: str) -> Tensor:
        state = self._state(name)
        if state is not None:
            weight = dequantize_4bit(self.base[name], state)
        elif self._packed(name):
            from bitsandbytes.functional import int8_vectorwise_dequant

            weight = int8_vectorwise_dequant(self.base[name], self.base[self._scales(name)])
        else:
            weight = self.base[name]
        return weight

    def _check(self) -> None:
        if self.spec.base_changed_by is not None:
            raise LoadError(
                f"adapter: got init_lora_weights={self.spec.base_changed_by!r}, which changed its base, "
                "expected one for the base as published. Load both with PEFT and pass the model instead."
            )
        wrong = [
            Mismatch(name, "tied weights that differ", "one update", "Pass untie=True.")
            for name in self._broken()
        ]
        wrong += list(self._unknown())
        if wrong:
            raise MismatchError("The adapter doesn't fit this base.", wrong)

    def _broken(self) -> list[str]:
        return (
            []
            if self.untie
            else list(self.spec.conflicts) + [n for n in self._modules if n in self.spec.ties]
        )

    def _unknown(self) -> Iterator[Mismatch]:
        """Compare names and shapes of what the spec needs with what both folders hold."""
        fix = "Is the adapter for this base? Else load both with PEFT and pass the model to merge_to_disk."
        held = set(self._names)
        wanted = [*self._modules, *(e.weight for e in self.spec.biases), *(e.weight for e in self.spec.rows)]
        for name in wanted:
            if name not in held and name not in self.spec.ties:
                yield Mismatch(name, "no such tensor in the base", "the weight that the adapter is for", fix)
        for module in self.spec.modules:
            if (
                not module.pieces
                and module.weight in held
                and self._describe(module.weight)[1] != module.shape
            ):
                yield Mismatch(module.weight, str(self._describe(module.weight)[1]), str(module.shape), fix)
        expected = {meta.name: meta.shape for meta in FactorSource(self._model).metadata()}
        for name in sorted(expected.keys() ^ set(self.factors.names)):
            got, needed = ("nothing", "a tensor") if name in expected else ("a tensor", "none of this name")
            if not name.endswith("base_layer.weight"):  # a frozen embedding that PEFT saved along
                yield Mismatch(name, got, needed, fix)
        for name in expected.keys() & set(self.factors.names):
            if self.factors.describe(name)[1] != expected[name]:
                yield Mismatch(name, str(self.factors.describe(name)[1]), str(expected[name]), fix)


def skeleton(base: Path, adapter: Path) -> Any:
    """Build the base model and the adapter's layers without storage, to learn names and shapes from.

    Raises:
        LoadError: One of the folders has no readable config.
    """
    import transformers
    from peft import PeftConfig, get_peft_model

    try:
        config = transformers.AutoConfig.from_pretrained(base)
        settings = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(
            f"{base}, {adapter}: got {error}, expected a model folder and a PEFT adapter folder."
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    name = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    kind: Any = getattr(transformers, name, transformers.AutoModelForCausalLM)
    changing = settings.init_lora_weights if hasattr(settings, "init_lora_weights") else None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if changing is not None:
            settings.init_lora_weights = False
        settings.inference_mode = False
        model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
        peft = get_peft_model(model, settings, low_cpu_mem_usage=True)
    if changing is not None:
        settings.init_lora_weights = changing
    return peft


def _by_weight(modules: tuple[FactorModule, ...]) -> dict[str, list[FactorModule]]:
    found: defaultdict[str, list[FactorModule]] = defaultdict(list)
    for module in modules:
        for name in module.pieces or (module.weight,):
            found[name].append(module)
    return dict(found)


def _finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no Inf in it, without a copy (`isfinite` makes several)."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    return all(math.isfinite(float(edge)) for edge in torch.aminmax(tensor))


def _is_companion(name: str) -> bool:
    return name.endswith((*_COMPANIONS, ".SCB", ".weight_format")) or _STATE in name


def _dtype_of(base: Path) -> torch.dtype:
    config = json.loads((base / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype") or "float16"
    dtype = getattr(torch, str(name), torch.float16)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16
