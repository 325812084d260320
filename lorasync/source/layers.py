"""What each kind of PEFT layer does to the weight below it, said in terms of `lorasync.merge`.

LoRA's own layers are spelled out here. Everything else that PEFT can merge goes through
`lorasync.source.replica`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft.tuners import lora
from peft.tuners.lora import variants
from peft.tuners.lora.layer import ParamWrapper, _ConvNd
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorasync.errors import Mismatch, MismatchError, UnmergeableError
from lorasync.merge import LowRank
from lorasync.merge.edits import Added, LowRankUpdate, Rows
from lorasync.source.model import transparent
from lorasync.zero import can_be_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lorasync.merge.edits import Edit
    from lorasync.source.trained import Adapters
    from lorasync.zero.whole import Whole

_DORA = (variants.DoraLinearVariant, variants.DoraEmbeddingVariant, variants._DoraConvNdVariant)
# Variants whose merge is plain LoRA's: they differ in how they start or how they train.
_MICA = (variants.MiCALinearVariant, variants.MiCAEmbeddingVariant)
_AS_LORA = (*_MICA, variants.VeloraLinearVariant)
# Where PEFT rounds the delta to the weight's dtype before it adds.
_CAST_FIRST = (lora.Embedding, lora.layer.MultiheadAttention, ParamWrapper)
_NEVER = {
    "ALoraLinearVariant": "aLoRA acts only after its invocation tokens: serve the adapter itself",
    "ArrowLinearVariant": "Arrow routes every token to other experts: remove the router adapter first",
    "QALoraLinearVariant": "QALoRA pools its inputs, PEFT can't merge it either: train plain LoRA",
}


@dataclass(frozen=True)
class Step:
    """One adapter's effect on one weight.

    ``edit`` makes the edit out of the parameters, given where to look up gathered ones. ``how`` is set for a low-rank
    merge, ``rows`` for trained tokens; a step without either adds to a bias.
    """

    layer: BaseTunerLayer
    adapter: str
    params: tuple[Tensor, ...]
    edit: Callable[[Whole], Edit]
    how: LowRank | None = None
    rows: tuple[int, ...] = ()


def active(layer: Any, adapters: Adapters) -> list[str]:
    """Name the adapters that are merged into this layer, in PEFT's order."""
    wanted = layer.active_adapters if adapters is None else adapters
    held = layer._get_available_adapters()
    return [name for name in wanted if name in held]


def spelled_out(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether this module knows the arithmetic of the layer; `lorasync.source.replica` takes the others."""
    if isinstance(layer, TrainableTokensLayer):
        return True
    if not isinstance(layer, lora.LoraLayer) or "adalora" in type(layer).__module__:
        return False
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, _DORA + _AS_LORA):
        return False
    kinds = (lora.Linear, lora.Embedding, _ConvNd, lora.layer.MultiheadAttention, ParamWrapper)
    return isinstance(layer, kinds) or _is_bnb(layer)


def steps(layer: BaseTunerLayer, adapter: str, attr: str, *, twice: bool) -> Iterator[Step]:
    """Yield what one adapter of a spelled-out layer does to the base parameter called ``attr``.

    ``twice`` is for the output projection inside an adapted `nn.MultiheadAttention`: PEFT adds its delta once
    as part of the attention and once as a layer of its own, in `forward` too, so that is the trained policy.
    """
    if isinstance(layer, TrainableTokensLayer):
        if attr == "weight":
            yield _rows(layer, adapter)
    elif attr == _weight_name(layer):
        if twice:
            yield low_rank_step(layer, adapter, cast_first=True)
        yield low_rank_step(layer, adapter)
    elif attr == "bias" and layer.lora_bias.get(adapter):
        yield _bias(layer, adapter)


def refuse(layer: Any, adapter: str, name: str, reason: str | None = None) -> None:
    """Raise for what has no merged form.

    Raises:
        UnmergeableError: The variant can't be merged; the message says what works instead.
    """
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    reason = _computed(layer, adapter) or reason or _NEVER.get(type(variant).__name__)
    base = layer.get_base_layer()
    if reason is None and isinstance(layer, _ConvNd) and base.groups > 1:
        reason = (
            f"a convolution with groups={base.groups} has no merge in PEFT: leave it out of target_modules"
        )
    biased = getattr(layer, "lora_bias", {}).get(adapter)
    if reason is None and biased and getattr(base, "bias", None) is None:
        reason = "lora_bias=True needs a bias in the base layer to be merged into: train with lora_bias=False"
    if reason is not None:
        raise UnmergeableError(
            f"{name}: got adapter {adapter!r} of {type(layer).__name__}, which can't be merged: {reason}."
        )


def _computed(layer: Any, adapter: str) -> str | None:
    """Return the reason if PyTorch computes this weight, or a factor, at each use, so that there is no parameter to read."""
    _, inner = chain_of(layer)
    weight = _weight_name(layer)
    held = inner._parameters.keys() | inner._buffers.keys()
    if weight not in held and hasattr(inner, weight):
        return (
            f"its base computes {weight} at each use (weight_norm, pruning, a parametrization): remove that before PEFT "
            "wraps the model"
        )
    for name in layer.adapter_layer_names:
        factor = getattr(layer, name, None)
        held_by = factor[adapter] if isinstance(factor, nn.ModuleDict) and adapter in factor else None
        if held_by is not None and hasattr(held_by, "weight") and "weight" not in held_by._parameters:
            return f"{name} computes its weight (weight_norm, a parametrization): remove that before training"
    return None


def refuse_rows_of_several(merged: list[tuple[Any, str]], name: str) -> None:
    """Refuse tokens that several adapters train: the last would win. PEFT refuses them as well.

    Raises:
        MismatchError: naming the tokens; or an index that the vocabulary doesn't have.
    """
    owner: dict[int, str] = {}
    wrong = []
    for layer, adapter in merged:
        if not isinstance(layer, TrainableTokensLayer):
            continue
        rows = len(layer.get_base_layer().weight) if not _is_sharded(layer) else None
        for index in map(int, layer.token_indices[adapter]):
            if index < 0 or (rows is not None and index >= rows):
                fix = "Train with trainable_token_indices within the vocabulary."
                wrong.append(
                    Mismatch(f"{name} ({adapter})", f"token {index}", f"0 to {(rows or 0) - 1}", fix)
                )
            elif index in owner:
                fix = "Push the adapters one at a time."
                wrong.append(
                    Mismatch(
                        f"{name} ({adapter})",
                        f"token {index}",
                        f"one adapter for it, not {owner[index]} too",
                        fix,
                    )
                )
            owner.setdefault(index, adapter)
    if wrong:
        raise MismatchError("Trained tokens can't be merged.", wrong)


def _is_sharded(layer: Any) -> bool:
    return can_be_sharded(layer.get_base_layer().weight)


def factors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
    """Return A and B of a LoRA layer as PEFT holds them."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def low_rank(layer: Any, adapter: str) -> LowRank:
    """Describe one adapter of a LoRA layer for `lorasync.merge.merge_low_rank`."""
    kind, transposed, experts = "linear", bool(getattr(layer, "fan_in_fan_out", False)), 1
    if isinstance(layer, lora.Embedding):
        kind = "embedding"
    elif isinstance(layer, _ConvNd):
        kind = "conv"
    elif isinstance(layer, ParamWrapper):
        kind, transposed, experts = "experts", not layer._did_swap_in_out_features, layer.num_experts
    return LowRank(
        kind=kind,
        scaling=float(layer.scaling[adapter]),
        transposed=transposed,
        experts=experts,
        dora=adapter in _dora_adapters(layer),
        cast_first=isinstance(layer, _CAST_FIRST) or isinstance(layer.lora_variant.get(adapter), _MICA),
        exact=_is_bnb(layer),
    )


def low_rank_step(layer: Any, adapter: str, *, cast_first: bool = False) -> Step:
    """Say what a LoRA or DoRA does to its weight."""
    how = low_rank(layer, adapter)
    how = replace(how, cast_first=True) if cast_first else how
    params = factors(layer, adapter)
    if how.dora:
        params = (*params, layer.lora_magnitude_vector[adapter].weight)

    return Step(layer, adapter, params, lambda whole: LowRankUpdate(how, *map(whole, params)), how=how)


def _bias(layer: Any, adapter: str) -> Step:
    added = layer.lora_B[adapter].bias
    return Step(layer, adapter, (added,), lambda whole: Added(whole(added), layer.scaling[adapter]))


def _rows(layer: Any, adapter: str) -> Step:
    rows = layer.trainable_tokens_delta[adapter]
    indices = tuple(int(index) for index in layer.token_indices[adapter])
    return Step(layer, adapter, (rows,), lambda whole: Rows(indices, whole(rows)), rows=indices)


def _dora_adapters(layer: Any) -> list[str]:
    return [name for name, variant in layer.lora_variant.items() if isinstance(variant, _DORA)]


def _weight_name(layer: Any) -> str:
    if isinstance(layer, ParamWrapper):
        return str(layer.parameter_name)
    return "in_proj_weight" if isinstance(layer, lora.layer.MultiheadAttention) else "weight"


def _is_bnb(layer: Any) -> bool:
    return type(layer).__module__ == "peft.tuners.lora.bnb"


def chain_of(layer: nn.Module) -> tuple[list[BaseTunerLayer], nn.Module]:
    """Return the adapter layers around one module, innermost first, and the module itself."""
    chain: list[BaseTunerLayer] = []
    inner: Any = layer
    while isinstance(inner, BaseTunerLayer):
        chain.append(inner)
        inner = inner.base_layer
        while (wrapped := transparent(inner)) is not None:
            inner = wrapped
    return chain[::-1], inner
