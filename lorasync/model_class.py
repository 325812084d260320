"""The class of transformers that a checkpoint is to be loaded with, by its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def class_of_name(architectures: Sequence[str] | None) -> Any:
    """Return transformers' class of the first name in a config's ``architectures``; None if it has no such class.

    Example:
        >>> class_of_name(["LlamaForCausalLM"]).__name__
        'LlamaForCausalLM'
    """
    import transformers

    name = (architectures or [""])[0]
    return getattr(transformers, name, None) if name else None


def class_named_by(config: Any) -> Any:
    """Return transformers' class that wrote a checkpoint; None if its code lies beside the weights, or it isn't known.

    Args:
        config: A `transformers.PretrainedConfig`.

    Example:
        >>> from transformers import LlamaConfig
        >>> class_named_by(LlamaConfig(architectures=["LlamaForCausalLM"])).__name__
        'LlamaForCausalLM'
    """
    if getattr(config, "auto_map", None):
        return None
    return class_of_name(getattr(config, "architectures", None))
