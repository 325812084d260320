"""`FactorSpec`: everything but the tensors that a receiver must know of an adapter. Needs no PEFT, for a worker reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from lorasync.merge import LowRank


@dataclass(frozen=True)
class FactorModule:
    """One weight with a low-rank update.

    ``weight`` is the base parameter's checkpoint name; where the checkpoint stores it in pieces (experts
    that are fused in memory), ``weight`` is its name in memory and ``pieces`` are the checkpoint's.
    ``a``, ``b`` and
    ``magnitude`` are names in the stream. ``dtype``, ``shape`` and ``base`` ("plain", "nf4", "fp4", "int8")
    describe the base weight that was trained on.
    """

    weight: str
    pieces: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    base: str
    r: int
    a: str
    b: str
    magnitude: str | None
    how: LowRank

    @property
    def kind(self) -> str:
        """What A and B look like: linear, embedding, conv or experts."""
        return self.how.kind

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by."""
        return self.how.scaling

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether a linear weight is stored as (in, out)."""
        return self.how.kind == "linear" and self.how.transposed

    @property
    def dora(self) -> bool:
        """Whether the merged rows are scaled to a trained magnitude."""
        return self.how.dora


@dataclass(frozen=True)
class FactorBias:
    """A trained ``lora_B`` bias: ``scaling`` times the tensor is added to the base's bias."""

    weight: str
    tensor: str
    scaling: float


@dataclass(frozen=True)
class FactorRows:
    """Trained tokens: these rows of ``weight`` are replaced by the rows of ``tensor``."""

    weight: str
    tensor: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class FactorSaved:
    """A tensor that was trained whole: it replaces ``weight``."""

    weight: str
    tensor: str


@dataclass(frozen=True)
class FactorSpec:
    """Everything but the tensors that a receiver needs, to merge the adapter or to serve it; JSON data.

    ``config`` is PEFT's adapter config, as in `adapter_config.json`. ``ties`` maps a weight that is not in
    the checkpoint to the one that stands for it; where such a weight has a module of its own here, its update
    must equal the other's, or a merge would untie them: a merging receiver compares. ``conflicts`` says why a
    merge would untie weights whatever the values are; serving the adapter is unaffected. ``base_changed_by``
    names the init that changed the base weights, so that the adapter does not belong to the published base.
    """

    adapter: str
    config: dict[str, Any]
    modules: tuple[FactorModule, ...]
    biases: tuple[FactorBias, ...]
    rows: tuple[FactorRows, ...]
    saved: tuple[FactorSaved, ...]
    ties: dict[str, str]
    conflicts: tuple[str, ...]
    base_changed_by: str | None

    def to_json(self) -> str:
        """Write the spec as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FactorSpec:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is no spec, or one of another version of lorasync.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or set(data) != {f.name for f in fields(cls)}:
            raise ValueError(
                "FactorSpec: got other fields than expected. Do both sides run the same lorasync?"
            )
        wrong = [
            f"{key}: {type(data[key]).__name__}"
            for key, kind in _JSON.items()
            if not isinstance(data[key], kind)
        ]
        if wrong:
            raise ValueError(f"FactorSpec: got {', '.join(wrong)}, expected what to_json wrote.")
        parts = {"modules": _module, "biases": _bias, "rows": _rows, "saved": _saved}
        read = {key: tuple(make(each) for each in data[key]) for key, make in parts.items()}
        return cls(**{**data, **read, "conflicts": tuple(data["conflicts"])})


_JSON: dict[str, type | tuple[type, ...]] = {
    "adapter": str,
    "config": dict,
    **dict.fromkeys(("modules", "biases", "rows", "saved", "conflicts"), list),
    "ties": dict,
    "base_changed_by": (str, type(None)),
}


def _module(data: dict[str, Any]) -> FactorModule:
    how = LowRank(**data["how"])
    return FactorModule(
        **{**data, "pieces": tuple(data["pieces"]), "shape": tuple(data["shape"]), "how": how}
    )


def _bias(data: dict[str, Any]) -> FactorBias:
    return FactorBias(**data)


def _rows(data: dict[str, Any]) -> FactorRows:
    return FactorRows(**{**data, "rows": tuple(data["rows"])})


def _saved(data: dict[str, Any]) -> FactorSaved:
    return FactorSaved(**data)
