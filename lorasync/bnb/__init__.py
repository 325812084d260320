"""All that knows bitsandbytes' attributes, its checkpoint layout and its settings; the rest of the package asks here.

`live` asks modules and tensors in memory, `values` turns packed weights into plain ones, `stored` reads and writes the
layout of a checkpoint, `settings` reads ``quantization_config``. bitsandbytes itself is imported inside functions only.
"""

from lorasync.bnb.live import (
    close_traps,
    compute_dtype,
    has_open_trap,
    int8_scales,
    is_packed,
    is_repacked,
    kind_of,
    largest,
    layer_bits,
    logical_4bit,
    missing_values,
    quant_state,
    scale_bound,
    set_compute_dtype,
    tensors_beside,
)
from lorasync.bnb.settings import Settings, read_settings
from lorasync.bnb.stored import Stored, as_stored, find_stored, require_library
from lorasync.bnb.values import dequantize_4bit, dequantize_8bit, packed_base, reads_wrong

__all__ = [
    "Settings",
    "Stored",
    "as_stored",
    "close_traps",
    "compute_dtype",
    "dequantize_4bit",
    "dequantize_8bit",
    "find_stored",
    "has_open_trap",
    "int8_scales",
    "is_packed",
    "is_repacked",
    "kind_of",
    "largest",
    "layer_bits",
    "logical_4bit",
    "missing_values",
    "packed_base",
    "quant_state",
    "read_settings",
    "reads_wrong",
    "require_library",
    "scale_bound",
    "set_compute_dtype",
    "tensors_beside",
]
