"""CUDA IPC: a trainer and vLLM's workers on one GPU; what travels is where things lie, not the things."""

from lorasync.transport.cuda_ipc.handle import NAME, NO_SHARED_GPU, gpu_of
from lorasync.transport.cuda_ipc.receiver import Receiver
from lorasync.transport.cuda_ipc.sender import Sender

__all__ = ["NAME", "NO_SHARED_GPU", "Receiver", "Sender", "gpu_of"]
