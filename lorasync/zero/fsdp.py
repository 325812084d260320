"""What FSDP leaves in a model: FSDP2's copies that outlive a forward pass, FSDP1's shards that are no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` (FSDP2) was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def drop_gathered(modules: Sequence[Any]) -> None:
    """Free what a forward pass has gathered: an optimizer changes the shards alone, so that it may be outdated.

    The root stays gathered after a forward pass by default. The next one gathers again.
    """
    for module in modules:
        module.reshard()


def is_fsdp_class(kind: type) -> bool:
    """Say whether `fully_shard` has made this class: it gives each module one of its own, above the module's first class."""
    return any(each.__name__ == "FSDPModule" for each in kind.__mro__)


def refuse_fsdp1(params: Iterable[Tensor]) -> None:
    """Refuse FSDP1's shards; within `summon_full_params` there are none.

    Args:
        params: The parameters of the layers that an adapter changes.

    Raises:
        AdapterError: with what works.
    """
    if any(getattr(param, "_fsdp_flattened", False) and param.dim() < 2 for param in params):
        raise AdapterError(
            "model: got shards of FSDP1 (FullyShardedDataParallel), expected whole weights. Use FSDP2 (fully_shard), which "
            "is gathered layer by layer; or make the source and push within "
            "FullyShardedDataParallel.summon_full_params(model), with use_orig_params=True."
        )
