"""What FSDP leaves in a model: FSDP2's copies that outlive a forward pass, FSDP1's shards that are no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.errors import AdapterError
from lorasync.source.structure import ADAPTER_MODULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` (FSDP2) was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def drop_gathered(modules: Sequence[Any]) -> None:
    """Free what a forward pass has gathered: an optimizer changes the shards alone, so that it may be outdated.

    The root stays gathered after a forward pass by default. The next one gathers again.
    """
    for module in modules:
        module.reshard()


def refuse_fsdp1(model: nn.Module) -> None:
    """Refuse FSDP1's shards; within `summon_full_params` there are none.

    Raises:
        AdapterError: with what works.
    """
    layers = [m for m in model.modules() if isinstance(m, ADAPTER_MODULES)]
    params = [param for layer in layers for param in layer.parameters()]
    if any(getattr(param, "_fsdp_flattened", False) and param.dim() < 2 for param in params):
        raise AdapterError(
            "model: got shards of FSDP1 (FullyShardedDataParallel), expected whole weights. Use FSDP2 (fully_shard), which "
            "is gathered layer by layer; or make the source and push within "
            "FullyShardedDataParallel.summon_full_params(model), with use_orig_params=True."
        )
