"""A trainer and vLLM's workers on one GPU: what travels is where things lie, not the things."""

from lorasync.transport.cuda_ipc.handle import NO_SHARED_GPU, gpu_of
from lorasync.transport.cuda_ipc.receiver import Openings
from lorasync.transport.cuda_ipc.sender import Lender, Letter

__all__ = ["NO_SHARED_GPU", "Lender", "Letter", "Openings", "gpu_of"]
