"""Finding out what packed a base's weights, and reading them back.

One answer for all who ask: of a tensor, a module or a model in memory (`of_tensor`, `of_module`, `of_model`), of a config
(`of_config`), of stored tensors (`of_tensors`) and of a folder (`of_folder`). Each asker says which kinds it reads, and
refuses the others by name.
"""

from lorasync.quantization.live import companions, of_model, of_module, of_tensor
from lorasync.quantization.methods import LIVE, LOADED, STORED, Quantization, method
from lorasync.quantization.stored import of_config, of_folder, of_tensors

__all__ = [
    "LIVE",
    "LOADED",
    "STORED",
    "Quantization",
    "companions",
    "method",
    "of_config",
    "of_folder",
    "of_model",
    "of_module",
    "of_tensor",
    "of_tensors",
]
