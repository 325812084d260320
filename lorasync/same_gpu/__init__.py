"""A trainer and vLLM's workers on one GPU: what travels is where things lie, not the things."""

from lorasync.same_gpu.handle import NO_SHARED_GPU, gpu_of
from lorasync.same_gpu.lender import Lender, Letter
from lorasync.same_gpu.openings import Openings

__all__ = ["NO_SHARED_GPU", "Lender", "Letter", "Openings", "gpu_of"]
