"""What the trainer's side relies on: engines as objects of this process, requests, vLLM's own sources."""

# ruff: noqa: E501 - a fact is a line
from __future__ import annotations

from tests.contracts.fact import Fact, Rule, is_there, offers, says, starts_with, takes
from tests.contracts.ways import (
    ACCEPTING,
    ADAPTER,
    ALL,
    ASYNC,
    ENGINES,
    HERE,
    NAMES,
    REPLICAS,
    SOURCE,
    THERE,
)

LLM = "vllm.entrypoints.llm:LLM"
LLM_ENGINE = "vllm.v1.engine.llm_engine:LLMEngine"
ASYNC_LLM = "vllm.v1.engine.async_llm:AsyncLLM"
CLIENT = "vllm.v1.engine.core_client"
BASE = "vllm.distributed.weight_transfer.base"
CONFIG = "vllm.config"

OFFLINE = (HERE, THERE)


def _fact(
    ours: str, of: str, ways: tuple[str, ...] = (), rule: Rule = is_there, what: str = "", **rest: str
) -> Fact:
    return Fact(f"lorasync/{ours}", of, rule, what, ways, **rest)


_PLUGIN = [
    _fact("plugin.py", "vllm.distributed.weight_transfer:WeightTransferEngineFactory", ALL),
    _fact("plugin.py", "vllm.distributed.weight_transfer:WeightTransferEngineFactory.register_engine", ALL, takes(3), "by place: name, module, class"),
    _fact("plugin.py", "vllm.distributed.weight_transfer:WeightTransferEngineFactory.register_engine", ALL, says("ValueError"), "raises ValueError for a name that is taken"),
    _fact("plugin.py", "vllm.v1.worker.worker_base:WorkerWrapperBase", ALL),
    _fact("vllm_seam/attach.py", "vllm.v1.worker.worker_base:WorkerWrapperBase.worker", ALL),
    _fact("vllm_seam/attach.py", "vllm.v1.worker.gpu_worker:Worker.weight_transfer_engine", ALL),
    _fact("vllm_seam/attach.py", "vllm.v1.worker.gpu_worker:Worker.vllm_config", ALL),
    _fact("vllm_seam/attach.py", "vllm.v1.worker.gpu_worker:Worker.device", ALL),
    _fact("vllm_seam/attach.py", "vllm.v1.worker.gpu_worker:Worker.get_model", ALL, takes(0)),
    _fact("vllm_seam/attach.py", f"{CONFIG}:WeightTransferConfig", ALL),
    _fact("vllm_seam/attach.py", f"{CONFIG}:set_current_vllm_config", ALL, takes(1)),
    _fact("vllm_seam/attach.py", "vllm.distributed.weight_transfer:WeightTransferEngineFactory", ALL),
    _fact("vllm_seam/attach.py", "vllm.distributed.weight_transfer:WeightTransferEngineFactory.create_engine", ALL, takes(4), "by place: config, vllm_config, device, model"),
    _fact("vllm_seam/attach.py", f"{CONFIG}:VllmConfig.weight_transfer_config", ALL),
    _fact("../pyproject.toml", "vllm.plugins:DEFAULT_PLUGINS_GROUP", ALL, offers("vllm.general_plugins"), "= the group of our entry point"),
]  # fmt: skip

_CALL = [
    _fact("targets/llm.py", f"{LLM}.collective_rpc", OFFLINE, takes(1, "args")),
    _fact("targets/llm.py", f"{LLM}.collective_rpc", OFFLINE, says("-> list"), "gives back what all workers return"),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.collective_rpc", (ASYNC,), takes(1, "args")),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.collective_rpc", (ASYNC,), says("return await self.engine_core.collective_rpc_async"), "gives back what the engine core returns"),
    _fact("targets/async_llm.py", f"{CLIENT}:AsyncMPClient.collective_rpc_async", (ASYNC,), says("return await self.call_utility_async('collective_rpc', method, timeout, args, kwargs)"), "calls the utility `collective_rpc` with method, timeout, args, kwargs"),
    _fact("targets/async_llm.py", f"{CLIENT}:DPLBAsyncMPClient.call_utility_all_async", (REPLICAS,), starts_with("method"), "asks every replica", since="0.32", instead="_call_utility_async for each of core_engines"),
    _fact("targets/async_llm.py", f"{CLIENT}:AsyncMPClient._call_utility_async", (REPLICAS,), takes(1, "engine"), "takes arguments by place, and which replica"),
    _fact("targets/async_llm.py", f"{CLIENT}:MPClient.core_engines", (REPLICAS,)),
    _fact("targets/base.py", "vllm.v1.serial_utils:run_method", ALL, says("getattr(obj, method)", "return func(*args, **kwargs)"), "calls whatever attribute of the worker has that name, and returns what it returns"),
    _fact("targets/base.py", "vllm.v1.executor.uniproc_executor:UniProcExecutor.collective_rpc", ALL, says("run_method(self.driver_worker, method, args, kwargs)"), "does so"),
    _fact("targets/base.py", "vllm.v1.executor.multiproc_executor:WorkerProc", ALL, says("getattr(self.worker, method)"), "does so too"),
    _fact("targets/base.py", "vllm.v1.worker.worker_base:WorkerWrapperBase.__getattr__", ALL, says("getattr(self.worker, attr)"), "passes on to the worker"),
    _fact("targets/base.py", "vllm.v1.worker.gpu_worker:Worker.weight_transfer_engine", ALL, what="keeps our weight_transfer_engine"),
    _fact("targets/base.py", "vllm.v1.worker.gpu_worker:Worker.load_model", ALL, says("self.weight_transfer_engine = WeightTransferEngineFactory.create_engine("), "makes our engine"),
]  # fmt: skip

_LLM = [
    _fact("targets/llm.py", f"{LLM}.llm_engine", OFFLINE),
    _fact("targets/llm.py", f"{LLM_ENGINE}.vllm_config", OFFLINE),
    _fact("targets/llm.py", f"{LLM_ENGINE}.engine_core", OFFLINE),
    _fact("targets/llm.py", f"{CLIENT}:InprocClient.engine_core", (HERE,), what="says that the core is in this process"),
    _fact("targets/llm.py", "vllm.v1.engine.core:EngineCore.model_executor", (HERE,)),
    _fact("targets/llm.py", "vllm.v1.executor.uniproc_executor:UniProcExecutor.driver_worker", (HERE,), what="says that the worker is in this process"),
    _fact("targets/llm.py", f"{LLM}.reset_prefix_cache", OFFLINE, takes(0)),
    _fact("targets/llm.py", f"{LLM}.reset_prefix_cache", OFFLINE, says("-> bool"), "says whether it did"),
    _fact("targets/llm.py", f"{LLM_ENGINE}.reset_encoder_cache", OFFLINE, takes(0)),
    _fact("targets/llm.py", f"{LLM_ENGINE}.set_weight_version", (NAMES,), takes(1), since="0.28", why="vLLM has no set_weight_version: outputs don't say of which version they are"),
    _fact("targets/llm.py", f"{LLM_ENGINE}.has_unfinished_requests", (), takes(0), "(named in an error)"),
    _fact("targets/llm.py", f"{LLM_ENGINE}.output_processor", OFFLINE),
    _fact("targets/llm.py", f"{LLM_ENGINE}.step", (), takes(0), "(named in an error)"),
    _fact("targets/llm.py", f"{LLM_ENGINE}.abort_request", (), takes(1, "internal"), "(named in an error)"),
    _fact("targets/llm.py", "vllm.v1.engine.output_processor:OutputProcessor.request_states", OFFLINE),
]  # fmt: skip

_FRONT = [
    _fact("targets/front.py", "vllm.v1.engine.output_processor:OutputProcessor.request_states", ENGINES),
    _fact("targets/front.py", "vllm.v1.engine.output_processor:RequestState.lora_request", ENGINES),
    _fact("targets/front.py", "vllm.v1.engine.output_processor:RequestState.lora_name", ENGINES),
    _fact("targets/front.py", "vllm.lora.request:LoRARequest.lora_int_id", ENGINES),
    _fact("targets/front.py", f"{LLM_ENGINE}.output_processor", OFFLINE),
    _fact("targets/front.py", f"{ASYNC_LLM}.output_processor", (ASYNC,)),
    _fact("targets/front.py", f"{CONFIG}:VllmConfig.weight_transfer_config", ALL),
    _fact("targets/front.py", f"{CONFIG}:VllmConfig.parallel_config", ALL),
    _fact("targets/front.py", "vllm.config.weight_transfer:WeightTransferConfig.backend", ALL),
]  # fmt: skip

_ASYNC = [
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.vllm_config", (ASYNC,)),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.output_handler", (ASYNC,), what="the task whose loop runs the engine"),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.engine_core", (ASYNC,)),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.errored", (ASYNC,)),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.update_weight_version", (NAMES,), takes(1), since="0.28", why="vLLM has no set_weight_version: outputs don't say of which version they are"),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.reset_prefix_cache", (ASYNC,), takes(0, "reset_running_requests")),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.reset_prefix_cache", (ASYNC,), says("-> bool"), "says whether it did"),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.reset_encoder_cache", (ASYNC,), takes(0)),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.renderer", (ASYNC,)),
    _fact("targets/async_llm.py", "vllm.renderers.base:BaseRenderer.clear_mm_cache_async", (ASYNC,), takes(0)),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.pause_generation", (ASYNC,), takes(0, "mode", "clear_cache")),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.resume_generation", (ASYNC,), takes(0)),
    _fact("targets/async_llm.py", f"{CLIENT}:AsyncMPClient.pause_scheduler_async", (ASYNC,), takes(0, "mode", "clear_cache"), "is what a pause `keep` comes down to"),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.pause_generation", (ACCEPTING,), says("pause_scheduler_async"), "calls pause_scheduler_async for every mode", until="0.32", why="vLLM rejects requests that come between a pause `wait` or `abort` and its end (HTTP 503); with `keep`, the default, they queue"),
    _fact("targets/base.py", "vllm.v1.engine:PauseMode", (ASYNC,), offers("keep", "wait", "abort"), "has keep, wait, abort"),
    _fact("targets/async_llm.py", f"{ASYNC_LLM}.pause_generation", (), says("renderer.clear_mm_cache_async"), "clears the front end's multimodal cache too"),
    _fact("targets/kinds.py", f"{ASYNC_LLM}.pause_generation", (ASYNC,), what="(tells an AsyncLLM from other objects)"),
    _fact("targets/kinds.py", f"{ASYNC_LLM}.output_handler", (ASYNC,), what="(tells an AsyncLLM from other objects)"),
    _fact("targets/kinds.py", f"{LLM}.llm_engine", OFFLINE, what="(tells an LLM from other objects)"),
    _fact("targets/kinds.py", f"{LLM_ENGINE}.engine_core", (), what="(tells an LLM from its llm_engine, for an error)"),
    _fact("targets/kinds.py", f"{BASE}:VLLMWeightSyncClient.update_weights", (), what="(told apart by its update_weights, for an error)"),
]  # fmt: skip

_DEATH = [
    _fact("targets/patience.py", f"{CLIENT}:MPClient.resources", (THERE, ASYNC)),
    _fact("targets/patience.py", f"{CLIENT}:BackgroundResources.engine_manager", (THERE, ASYNC)),
    _fact("targets/patience.py", f"{CLIENT}:BackgroundResources.engine_dead", (THERE, ASYNC)),
    _fact("targets/patience.py", "vllm.v1.engine.utils:CoreEngineProcManager.finished_procs", (THERE, ASYNC), takes(0)),
    _fact("targets/patience.py", "vllm.v1.engine.utils:CoreEngineProcManager.failed_proc_name", (THERE, ASYNC)),
    _fact("targets/patience.py", "vllm.v1.engine.exceptions:EngineDeadError", (THERE, ASYNC), what="(known by its name)"),
    _fact("targets/patience.py", "vllm.v1.engine.core", (THERE, ASYNC), says("method failed: "), "says that a call's “method failed: …”"),
    _fact("targets/patience.py", "vllm.v1.engine.core", (THERE, ASYNC), says("Executor failed"), "says “Executor failed”"),
]  # fmt: skip

_REQUESTS = [
    _fact("push/adapter_request.py", "vllm.lora.request:LoRARequest", (ADAPTER,), starts_with("lora_name", "lora_int_id", "lora_path"), "= name, id, path by place"),
    _fact("push/adapter_request.py", "vllm.lora.request:LoRARequest", (ADAPTER,), says("msgspec.Struct", "array_like=True"), "is a mutable msgspec.Struct"),
    _fact("push/adapter_request.py", "vllm.lora.request:LoRARequest.lora_int_id", (ADAPTER,)),
    _fact("push/adapter_request.py", "vllm.lora.request:LoRARequest.lora_path", (ADAPTER,)),
    _fact("push/adapter_request.py", "vllm.v1.engine.output_processor:RequestState.__init__", (ADAPTER,), says("lora_request.lora_name"), "reads lora_name of every request, before the core hears of it"),
    _fact("push/adapter_request.py", "vllm.exceptions:VLLMClientError", (ADAPTER,), since="0.28", instead="ValueError, which AsyncLLM.generate passes on as the client's"),
    _fact("push/adapter_request.py", "vllm.v1.engine.async_llm:AsyncLLM.generate", (ADAPTER,), says("VLLMClientError"), "passes it on as a fault of one request", since="0.28", instead="ValueError"),
    _fact("push/issued.py", "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys", (), says("lora_path"), "makes the path part of the prefix cache's key", since="0.31", instead="the name, which is another for every version"),
]  # fmt: skip

_LAYOUT = [
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.data_parallel_size", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.pipeline_parallel_size", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.nnodes", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.world_size", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.rank", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.data_parallel_index", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.data_parallel_external_lb", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.data_parallel_hybrid_lb", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.distributed_executor_backend", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:ParallelConfig.enable_expert_parallel", ALL),
    _fact("vllm_seam/layout.py", "vllm.config.parallel:DistributedExecutorBackend", (), offers("external_launcher"), "has external_launcher"),
    _fact("planning/plan.py", f"{LLM}.llm_engine", ()),
    _fact("planning/plan.py", f"{LLM_ENGINE}.vllm_config", ()),
    _fact("planning/plan.py", f"{CONFIG}:VllmConfig.lora_config", ()),
    _fact("planning/plan.py", "vllm.config.lora:LoRAConfig.max_lora_rank", ()),
]  # fmt: skip

_VERIFY = [
    _fact("vllm_seam/sampling.py", "vllm:SamplingParams", (), takes(0, "temperature", "max_tokens", "logprobs")),
    _fact("verify.py", f"{LLM}.llm_engine", ()),
    _fact("verify.py", f"{LLM}.generate", (), takes(2, "use_tqdm", "lora_request")),
    _fact("verify.py", f"{ASYNC_LLM}.generate", (), takes(3, "lora_request")),
    _fact("verify.py", f"{ASYNC_LLM}.output_handler", ()),
    _fact("verify.py", "vllm.outputs:RequestOutput.prompt_token_ids", ()),
    _fact("verify.py", "vllm.outputs:RequestOutput.outputs", ()),
    _fact("verify.py", "vllm.outputs:CompletionOutput.token_ids", ()),
    _fact("verify.py", "vllm.outputs:CompletionOutput.logprobs", ()),
    _fact("verify.py", "vllm.logprobs:Logprob.logprob", ()),
]  # fmt: skip

_SOURCE = [
    _fact("vllm_seam/weight_source.py", f"{BASE}:WeightSource", (SOURCE,)),
    _fact("vllm_seam/weight_source.py", f"{BASE}:ParamMeta", (SOURCE,), starts_with("name", "dtype", "shape"), "= name, dtype, shape by place"),
    _fact("vllm_seam/weight_source.py", f"{BASE}:ParamMeta", (SOURCE,), takes(3), "needs no more"),
    _fact("vllm_seam/weight_source.py", f"{BASE}:WeightSource.iter_full", (SOURCE,), since="0.33", instead="__iter__"),
    _fact("vllm_seam/weight_source.py", f"{BASE}:WeightSource.__iter__", (SOURCE,), until="0.32", instead="iter_full"),
    _fact("vllm_seam/weight_source.py", f"{BASE}:WeightSource.metadata", (SOURCE,)),
    _fact("vllm_seam/weight_source.py", f"{BASE}:WeightSource.__init_subclass__", (SOURCE,), says("cached_property"), "wants metadata to be a cached_property", since="0.33", instead="a method"),
]  # fmt: skip

PUSH = (*_PLUGIN, *_CALL, *_LLM, *_FRONT, *_ASYNC, *_DEATH, *_REQUESTS, *_LAYOUT, *_VERIFY, *_SOURCE)
