"""Loading with bitsandbytes: `load_quantized`, its `LoadReport`, and the AVX512 trap that it closes."""

from lorasync.load.loader import close_avx512_trap, load_quantized
from lorasync.load.report import LoadReport

__all__ = ["LoadReport", "close_avx512_trap", "load_quantized"]
