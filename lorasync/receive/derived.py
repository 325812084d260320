"""What an engine derives from its weights (packed copies, absorbed projections, fp32 sinks), derived anew after a push."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch
from lorasync.receive.reload import in_place
from lorasync.vllm_seam.layers import is_attention, is_plain_attention, repack_for_cpu

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch


class Derived:
    """The layers of a served model that hold more than their weights."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._on_cpu = not any(param.is_cuda for param in model.parameters())
        self._attention = list(_attention_that_derives(model))
        self._owners = _owners_by_storage(model) if self._on_cpu or self._attention else {}

    def refresh(self, tensors: Iterable[torch.Tensor]) -> None:
        """After these parameters were written."""
        if not self._owners:
            return
        owners = {id(o): o for tensor in tensors for o in self._owners.get(_storage(tensor), ())}
        if self._on_cpu:
            for layer in owners.values():
                repack_for_cpu(layer)
        self.derive_from(owners.values())

    def derive_from(self, layers: Iterable[torch.nn.Module]) -> None:
        """After the weights of these layers were written: what attention layers absorb of them."""
        changed = {id(layer) for layer in layers}
        for attention, parent in self._attention:
            if id(parent) in changed or any(id(m) in changed for m in attention.modules()):
                _derive(attention, parent, self._dtype)


def derived_elsewhere(model: torch.nn.Module) -> list[Mismatch]:
    """What this model makes of its weights once, when it starts, in code that can't be run again."""
    fix = "Use ServeAdapter, which leaves the weights alone, or another class of model."
    wrong = []
    hook = getattr(type(model), "process_weights_after_loading", None)
    if hook is not None and not _does_nothing(hook):
        got = f"{type(model).__name__}.process_weights_after_loading, which runs when the engine starts"
        wrong.append(Mismatch("the model", got, "nothing that is derived from all weights at once", fix))
    for name, module in model.named_modules():
        if module is not model and hasattr(module, "post_weight_load"):
            got = f"{type(module).__name__}.post_weight_load: its sinks are in the KV cache already"
            wrong.append(Mismatch(name, got, "nothing that is kept in the KV cache", fix))
    return wrong


def _attention_that_derives(model: torch.nn.Module) -> Iterable[tuple[Any, torch.nn.Module]]:
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if is_attention(layer) and _derives(layer):
            yield layer, modules[name.rpartition(".")[0]]


def _derives(layer: Any) -> bool:
    own = not (is_plain_attention(layer) or _only_shows(layer))
    hook = getattr(type(getattr(layer, "impl", None)), "process_weights_after_loading", None)
    return own or _sinks(layer) is not None or (hook is not None and not _does_nothing(hook))


def _only_shows(layer: Any) -> bool:
    """Whether all it absorbs are views of one weight, so that they follow it (MLA over a plain ``kv_b_proj``)."""
    weight = getattr(getattr(layer, "kv_b_proj", None), "weight", None)
    own = [param for param in layer._parameters.values() if param is not None]
    return weight is not None and bool(own) and all(_storage(p) == _storage(weight) for p in own)


def _derive(layer: Any, parent: torch.nn.Module, dtype: torch.dtype) -> None:
    """Run vLLM's own code; the tensors stay where captured graphs read them."""
    impl: Any = getattr(layer, "impl", None)
    if is_plain_attention(layer):  # its own hook would set KV scales back that were measured since
        in_place(impl, lambda: impl.process_weights_after_loading(dtype))
    else:
        held = impl if impl is not None else layer
        in_place(held, lambda: in_place(layer, lambda: layer.process_weights_after_loading(dtype)))
    sinks, source = _sinks(layer), getattr(parent, "sinks", None)
    if sinks is not None and source is not None and _storage(sinks) != _storage(source):
        sinks.copy_(source)  # vLLM casts them at the first forward, and not again


def _sinks(layer: Any) -> Any:
    return getattr(getattr(layer, "impl", None), "sinks", None)


def _does_nothing(function: Any) -> bool:
    """Whether a function's body is a docstring or ``pass``."""
    code = getattr(function, "__code__", None)
    return code is not None and not code.co_names and len(code.co_consts) <= 2


def _owners_by_storage(model: torch.nn.Module) -> dict[int, Collection[torch.nn.Module]]:
    found: dict[int, list[torch.nn.Module]] = defaultdict(list)
    for layer in model.modules():
        for param in layer.parameters(recurse=False):
            if param.numel():
                found[_storage(param)].append(layer)
    return dict(found)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
