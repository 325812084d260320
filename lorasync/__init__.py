"""Keep a live vLLM engine in step with a policy trained by LoRA or QLoRA."""

__version__ = "0.1.0"
