"""Names: what PEFT calls a parameter in memory → what the merged checkpoint calls it.

Two steps, and each is usable on its own. `checkpoint_name` takes PEFT's wrapping off a single name, by
whole segments. `CheckpointLayout` then undoes what transformers v5 did when it loaded the checkpoint
(fused experts, moved prefixes), cut into the smallest groups of tensors that have to be converted together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor, dtype

# Segments that wrappers put into a path and that no checkpoint knows.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}) | {
    "base_layer",
    "token_adapter",
}
_VALUE_HEAD = ["pretrained_model"]  # TRL's models with a value head
# What PEFT's tuners call their own parameters (PEFT_TYPE_TO_PREFIX_MAPPING and the shared projections).
# fmt: off
_ADAPTER_PREFIXES = (
    "lora_", "adamss_", "adaption_prompt_", "beft_", "boft_", "c3a_", "cartridge_", "cpt_", "deft_",
    "delora_", "fourierft_", "frod_", "glora_", "gralora_", "hada_", "hira_", "hra_", "ia3_",
    "lily_", "ln_tuning_", "lokr_", "miss_", "multitask_prompt_tuning_", "oft_", "osf_",
    "p_tuning_", "peanut_", "poly_", "prefix_tuning_", "prompt_tuning_", "psoft_", "pvera_",
    "randlora_", "road_", "shadow_", "shira_", "supertuning_", "tinylora_", "trainable_tokens_",
    "unilora_", "vblora_", "vera_", "waveft_", "xlora_"
)
# fmt: on
_PROMPT_SEGMENTS = frozenset({"prompt_encoder", "word_embeddings_prompt"})
# What bitsandbytes keeps beside a packed weight.
_INT8_COMPANIONS = frozenset({"SCB", "CB", "weight_format"})
_FOUR_BIT_COMPANIONS = frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state"})


def checkpoint_name(name: str, *, adapters: Collection[str] | None = None) -> str | None:
    """Map a parameter's in-memory name under PEFT to its name in the merged checkpoint.

    Args:
        name: As `model.named_parameters()` gives it, from a PeftModel, a model with injected adapters, or one
            that DDP, DeepSpeed, FSDP1, activation checkpointing or `torch.compile` wrapped once more, or of whose parts
            PEFT wrapped one. Of a module of your own around a policy (an actor) pass the names of the policy itself:
            what comes before a PeftModel may belong to the checkpoint's name, and is kept.
        adapters: The adapters that are merged; saved modules of other adapters then have no name. ``None``
            means all.

    Returns:
        The name, or ``None`` where the merged checkpoint has no tensor for it: factors, magnitudes, replaced
        originals, the companions of a quantized weight.

    Example:
        >>> checkpoint_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
        >>> checkpoint_name("base_model.model.lm_head.modules_to_save.policy.weight")
        'lm_head.weight'
        >>> checkpoint_name("base_model.model.lm_head.lora_A.policy.weight") is None
        True
    """
    path = _without_peft(name.split("."))
    if _is_companion(path) or any(_is_adapter(segment) for segment in path):
        return None
    kept: list[str] = []
    segments = iter(path)
    for segment in segments:
        if segment == "original_module":
            return None
        if segment == "modules_to_save":
            adapter = next(segments, None)
            if adapters is not None and adapter not in adapters:
                return None
        elif segment not in _WRAPPERS:
            kept.append(segment)
    return ".".join(kept)


def _without_peft(path: list[str]) -> list[str]:
    """Take off what PeftModel (``base_model.model``) puts into a path, and what wraps it or the whole model.

    A path before a PeftModel is kept: PEFT may wrap a part of a model (``model.language_model``). DDP's and DeepSpeed's
    ``module`` goes only in front, as models call parts of theirs so too.
    """
    at = next((i for i in range(len(path) - 1) if path[i : i + 2] == ["base_model", "model"]), None)
    if at is None:
        return _without_engine(path)
    outside = [segment for segment in _without_engine(path[:at]) if segment != "module"]
    return ([] if outside == _VALUE_HEAD else outside) + path[at + 2 :]


def _without_engine(path: list[str]) -> list[str]:
    while path and (path[0] == "module" or path[0] in _WRAPPERS):
        path = path[1:]
    return path


def _is_adapter(segment: str) -> bool:
    return segment in _PROMPT_SEGMENTS or segment.startswith(_ADAPTER_PREFIXES)


def _is_companion(path: list[str]) -> bool:
    """`weight.absmax`, `weight.quant_state.bitsandbytes__nf4`, `SCB` and the like."""
    below_weight = path[path.index("weight") + 1 :][:1] if "weight" in path else []
    return path[-1] in _INT8_COMPANIONS or not _FOUR_BIT_COMPANIONS.isdisjoint(below_weight)


@dataclass(frozen=True)
class Group:
    """Tensors that must be converted together, as names in memory, and what they become.

    ``outputs`` are the checkpoint's names with dtype and shape, in the order in which they come. ``renamed``
    says that a single tensor only gets another name: its values need no work.
    """

    members: tuple[str, ...]
    outputs: tuple[tuple[str, dtype, tuple[int, ...]], ...]
    renamed: bool


@dataclass
class CheckpointLayout:
    """Transformers v5's reverse conversion of one model, cut into the smallest groups that it needs.

    Args:
        model: The bare base model (a PreTrainedModel; any other module converts nothing).

    Conversions that a quantizer of transformers added while loading are left out: a merged weight is a plain
    one. Source: ``transformers.core_model_loading.revert_weight_conversion``.

    Example:
        >>> import torch
        >>> CheckpointLayout(torch.nn.Linear(2, 2)).groups({"weight": torch.empty(2, 2, device="meta")})
        [Group(members=('weight',), outputs=(('weight', torch.float32, (2, 2)),), renamed=True)]
    """

    model: Any
    _twin: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        conversions = _conversions(self.model)
        self._twin = _with_conversions(self.model, conversions) if conversions else None

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert one group's tensors, named as in memory, to the checkpoint's names and shapes."""
        if self._twin is None:
            return dict(tensors)
        from transformers.core_model_loading import revert_weight_conversion

        self._twin.__dict__["_in_conversion"] = tensors
        try:
            converted: dict[str, Tensor] = revert_weight_conversion(self._twin, dict(tensors))
        finally:
            self._twin.__dict__["_in_conversion"] = {}
        return converted

    def groups(self, tensors: Mapping[str, Tensor]) -> list[Group]:
        """Cut ``tensors`` (meta tensors do) into groups; a group stands where its first member stands."""
        if self._twin is None:
            return [Group((name,), (_describe(name, t),), renamed=True) for name, t in tensors.items()]
        return [self._group(members, tensors) for members in self._components(tensors)]

    def _components(self, tensors: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
        """Join the tensors which, converted one by one, would end up under the same checkpoint name."""
        owner: dict[str, int] = {}
        components: dict[int, list[str]] = {}
        for index, (name, tensor) in enumerate(tensors.items()):
            targets = self.convert({name: tensor})
            joined = sorted({owner[target] for target in targets if target in owner})
            home = joined[0] if joined else index
            members = components.setdefault(home, [])
            for other in joined[1:]:
                members.extend(components.pop(other))
                owner.update({target: home for target, at in owner.items() if at == other})
            members.append(name)
            owner.update(dict.fromkeys(targets, home))
        return [tuple(members) for _, members in sorted(components.items())]

    def _group(self, members: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Group:
        outputs = self.convert({name: tensors[name] for name in members})
        described = tuple(_describe(name, tensor) for name, tensor in outputs.items())
        same = len(members) == len(outputs) == 1 and next(iter(outputs.values())) is tensors[members[0]]
        return Group(members, described, renamed=same)


def _with_conversions(model: Any, conversions: list[Any]) -> Any:
    """The same model as another object, that knows these conversions only.

    Some conversions ask the model for a parameter by its name, to compare shapes. Adapters have moved it, and under
    ZeRO-3 it has none: what is being converted is found first.
    """

    class Converted(type(model)):  # type: ignore[misc]
        def get_parameter(self, target: str) -> Any:
            found = self.__dict__["_in_conversion"].get(target)
            return super().get_parameter(target) if found is None else found

    conversions = [_for_single_tensors(conversion) for conversion in conversions]
    twin = copy.copy(model)  # its dicts of parameters and modules are the model's own
    twin.__class__ = Converted
    twin.__dict__.update(_weight_conversions=conversions, _in_conversion={})
    return twin


def _for_single_tensors(conversion: Any) -> Any:
    """Renames that go by pairs (``norm0`` to ``norm1``, ``norm1`` to ``norm2``) wait for the first of a pair to come by.

    In a whole model it has come by; here tensors come one at a time.
    """
    if not hasattr(conversion, "_active"):
        return conversion

    class Active(type(conversion)):  # type: ignore[misc]
        __slots__ = ()

        def reverse_transform(self) -> Any:
            reverse = super().reverse_transform()
            reverse._active = True
            return reverse

    active = copy.copy(conversion)
    active.__class__ = Active
    return active


def _describe(name: str, tensor: Tensor) -> tuple[str, dtype, tuple[int, ...]]:
    return name, tensor.dtype, tuple(tensor.shape)


def _conversions(model: Any) -> list[Any]:
    """What transformers did to this checkpoint on the way in, less what its quantizers did.

    A model that was not loaded by `from_pretrained` has the default conversions of its kind, without the
    prefix changes: nobody knows whether its checkpoint would have had the prefix.
    """
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is None:
        loaded = _default_conversions(model)
    kept = [conversion for conversion in loaded if not _from_quantizer(conversion)]
    # A quantizer that dequantizes while loading puts its step into the model's own conversions: those come back plain.
    lost = {_targets(conversion) for conversion in loaded if _from_quantizer(conversion)}
    if not lost:
        return kept
    return kept + [conversion for conversion in _default_conversions(model) if _targets(conversion) in lost]


def _targets(conversion: Any) -> tuple[str, ...]:
    return tuple(pattern.removesuffix("$") for pattern in getattr(conversion, "target_patterns", ()))


def _default_conversions(model: Any) -> list[Any]:
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    defaults: Iterable[Any] = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in defaults if not isinstance(conversion, PrefixChange)]


def _from_quantizer(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(type(op).__module__.startswith("transformers.integrations.") for op in operations)
