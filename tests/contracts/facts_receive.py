"""What the workers' side relies on: the worker engine, the served model, layers that are loaded anew, LoRA slots."""

# ruff: noqa: E501 - a fact is a line
from __future__ import annotations

from tests.contracts.fact import (
    Fact,
    Rule,
    can_be_made_by,
    is_there,
    offers_only,
    says,
    starts_with,
    takes,
)
from tests.contracts.ways import ADAPTER, ALL, CPU_EXPERTS, PUSHES, WEIGHTS

ENGINE = "vllm.distributed.weight_transfer.base:WeightTransferEngine"
WORKER = "vllm.v1.worker.gpu_worker:Worker"
RELOAD = "vllm.model_executor.model_loader.reload"
LAYERS = "vllm.model_executor.layers"
MANAGER = "vllm.lora.model_manager:LoRAModelManager"
EXPERTS = f"{LAYERS}.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod"
CONFIG = "vllm.config"

_ON_CPU = (CPU_EXPERTS,)


def _fact(
    ours: str, of: str, ways: tuple[str, ...] = (), rule: Rule = is_there, what: str = "", **rest: str
) -> Fact:
    return Fact(f"lorasync/{ours}", of, rule, what, ways, **rest)


_ENGINE = [
    _fact("receive/engine.py", ENGINE, ALL, can_be_made_by("lorasync/receive/engine.py", "WorkerEngine"), "has no abstract method that WorkerEngine lacks"),
    _fact("receive/engine.py", f"{ENGINE}.__init__", ALL, takes(4), "by place: config, vllm_config, device, model"),
    _fact("receive/engine.py", f"{ENGINE}.__init__", ALL, starts_with("config", "vllm_config", "device", "model"), "in this order"),
    _fact("receive/engine.py", f"{ENGINE}.vllm_config", ALL),
    _fact("receive/engine.py", f"{ENGINE}.init_info_cls", ALL),
    _fact("receive/engine.py", f"{ENGINE}.update_info_cls", ALL),
    _fact("receive/engine.py", f"{ENGINE}.supports_draft_weight_update", ALL),
    _fact("receive/engine.py", f"{ENGINE}.shutdown", ALL, takes(0)),
    _fact("receive/engine.py", f"{ENGINE}.init_transfer_engine", (), what="(refused)"),
    _fact("receive/engine.py", f"{ENGINE}.start_weight_update", (), what="(refused)"),
    _fact("receive/engine.py", f"{ENGINE}.receive_weights", (), what="(refused)"),
    _fact("receive/engine.py", f"{ENGINE}.finish_weight_update", (), what="(refused)"),
    _fact("receive/engine.py", f"{ENGINE}.trainer_send_weights", (), until="0.27", instead="defined, and never called"),
    _fact("receive/engine.py", f"{CONFIG}:VllmConfig.parallel_config", ALL),
    _fact("receive/conversation.py", f"{CONFIG}:VllmConfig.parallel_config", ALL),
    _fact("receive/conversation.py", f"{CONFIG}:VllmConfig.model_config", ALL),
    _fact("receive/conversation.py", "vllm.config.model:ModelConfig.is_multimodal_model", ALL),
    _fact("receive/conversation.py", "vllm.config.lora:LoRAConfig.lora_dtype", ALL),
    _fact("vllm_seam/config.py", f"{CONFIG}:set_current_vllm_config", ALL, takes(1)),
    _fact("receive/served.py", f"{CONFIG}:VllmConfig.lora_config", ALL),
    _fact("receive/served.py", f"{CONFIG}:ModelConfig.dtype", ALL),
]  # fmt: skip

_TWIN = [
    _fact("vllm_seam/build.py", f"{CONFIG}:set_current_vllm_config", PUSHES, takes(1)),
    _fact("vllm_seam/build.py", "vllm.model_executor.model_loader.utils:initialize_model", PUSHES, takes(0, "vllm_config")),
    _fact("vllm_seam/build.py", f"{CONFIG}:VllmConfig.compilation_config", PUSHES),
    _fact("vllm_seam/build.py", f"{CONFIG}:VllmConfig.quant_config", PUSHES),
    _fact("receive/twin.py", f"{CONFIG}:VllmConfig.model_config", PUSHES),
    _fact("vllm_seam/build.py", "vllm.config.model:ModelConfig.dtype", PUSHES),
    _fact("receive/twin.py", "vllm.config.model:ModelConfig.architectures", PUSHES),
    _fact("vllm_seam/build.py", "vllm.config.compilation:CompilationConfig.static_forward_context", PUSHES),
    _fact("vllm_seam/build.py", "vllm.config.compilation:CompilationConfig.static_all_moe_layers", PUSHES),
    _fact("vllm_seam/build.py", f"{RELOAD}.meta:to_meta_tensor", PUSHES, takes(1)),
    _fact("vllm_seam/build.py", f"{LAYERS}.rotary_embedding:_ROPE_DICT", PUSHES),
    _fact("vllm_seam/layers.py", f"{LAYERS}.quantization.base_config:QuantizeMethodBase.uses_meta_device", PUSHES),
    _fact("receive/served.py", "vllm.config.parallel:ParallelConfig.tensor_parallel_size", PUSHES),
    _fact("receive/bases.py", "vllm.config.model:ModelConfig.model", PUSHES),
    _fact("receive/bases.py", "vllm.config.model:ModelConfig.revision", PUSHES),
    _fact("vllm_seam/config.py", f"{CONFIG}:VllmConfig.quant_config", PUSHES),
    _fact("vllm_seam/config.py", f"{CONFIG}:VllmConfig.load_config", PUSHES),
    _fact("vllm_seam/config.py", f"{CONFIG}:VllmConfig.speculative_config", PUSHES),
    _fact("vllm_seam/config.py", "vllm.config.load:LoadConfig.load_format", PUSHES),
    _fact("vllm_seam/config.py", "vllm.config.speculative:SpeculativeConfig.method", PUSHES),
    _fact("vllm_seam/config.py", f"{LAYERS}.quantization.base_config:QuantizationConfig.get_name", PUSHES, takes(0)),
    _fact("vllm_seam/layers.py", f"{EXPERTS}", PUSHES),
    _fact("vllm_seam/layers.py", f"{LAYERS}.linear:UnquantizedLinearMethod", PUSHES),
    _fact("vllm_seam/layers.py", f"{LAYERS}.quantization.base_config:QuantizeMethodBase", PUSHES),
    _fact("vllm_seam/layers.py", f"{LAYERS}.quantization.kv_cache:BaseKVCacheMethod", PUSHES),
    _fact("vllm_seam/layers.py", f"{LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod", PUSHES),
]  # fmt: skip

_RELOAD = [
    _fact("vllm_seam/reload.py", f"{RELOAD}.layerwise:get_layerwise_info", WEIGHTS, takes(1)),
    _fact("vllm_seam/reload.py", f"{RELOAD}.types:LayerReloadingInfo.restore_metadata", WEIGHTS),
    _fact("vllm_seam/reload.py", f"{RELOAD}.types:LayerReloadingInfo.restore_device", WEIGHTS),
    _fact("vllm_seam/reload.py", f"{RELOAD}.meta:materialize_meta_tensor", WEIGHTS, takes(1)),
    _fact("vllm_seam/reload.py", f"{RELOAD}.meta:SKIP_TENSORS", WEIGHTS),
    _fact("vllm_seam/reload.py", f"{RELOAD}.sanitize:restore_layer_refs", WEIGHTS, takes(2)),
    _fact("vllm_seam/reload.py", f"{RELOAD}.layerwise:_get_original_loader", WEIGHTS, takes(1)),
    _fact("vllm_seam/reload.py", f"{LAYERS}.quantization.base_config:QuantizeMethodBase.process_weights_after_loading", WEIGHTS, takes(1)),
    _fact("vllm_seam/reload.py", f"{RELOAD}.layerwise:_layerwise_process", WEIGHTS, says("_already_called_process_weights_after_loading"), "marks layers with _already_called_process_weights_after_loading"),
    _fact("vllm_seam/reload.py", f"{RELOAD}.layerwise:_layerwise_process", (), says("update_param_tp_status"), "calls update_param_tp_status"),
    _fact("vllm_seam/reload.py", f"{EXPERTS}", WEIGHTS),
    _fact("vllm_seam/reload.py", f"{LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase.moe_kernel", WEIGHTS),
    _fact("vllm_seam/reload.py", f"{LAYERS}.fused_moe.modular_kernel:FusedMoEKernel.fused_experts", WEIGHTS),
    _fact("vllm_seam/reload.py", "vllm.model_executor.parameter:BasevLLMParameter.weight_loader", WEIGHTS),
    _fact("vllm_seam/reload.py", f"{EXPERTS}._setup_kernel", _ON_CPU, says("fused_experts.process_weights_after_loading"), "packs experts of a CPU by fused_experts, the first time only", since="0.28", why="vLLM has no kernel object for them there, which lorasync asks to pack them"),
    _fact("receive/reload.py", f"{EXPERTS}._setup_kernel", (), says("prefer_copy"), "copies reloaded experts into their old storage", until="0.32", instead="copied by FreshLayer.close"),
    _fact("vllm_seam/attention.py", f"{LAYERS}.attention_layer_base:AttentionLayerBase", WEIGHTS),
    _fact("vllm_seam/attention.py", f"{LAYERS}.attention:Attention", WEIGHTS),
    _fact("vllm_seam/attention.py", f"{LAYERS}.attention:Attention.process_weights_after_loading", WEIGHTS, takes(1)),
    _fact("vllm_seam/layers.py", f"{LAYERS}.utils", WEIGHTS, says("cpu_linear"), "keeps packed weights behind cpu_linear"),
    _fact("vllm_seam/layers.py", f"{LAYERS}.utils", WEIGHTS, says("_cpu_unpacked_conv_weight"), "keeps unpacked convolutions as _cpu_unpacked_conv_weight"),
    _fact("vllm_seam/attention.py", "vllm.v1.attention.backend:AttentionImplBase.process_weights_after_loading", WEIGHTS, takes(1)),
]  # fmt: skip

_LORA = [
    _fact("vllm_seam/lora.py", "vllm.lora.peft_helper:PEFTHelper", (ADAPTER,)),
    _fact("vllm_seam/lora.py", "vllm.lora.peft_helper:PEFTHelper.from_dict", (ADAPTER,), takes(1)),
    _fact("vllm_seam/lora.py", "vllm.lora.peft_helper:PEFTHelper.validate_legal", (ADAPTER,), takes(1)),
    _fact("vllm_seam/lora.py", "vllm.lora.peft_helper:PEFTHelper.validate_legal", (ADAPTER,), says("ValueError"), "raises ValueError"),
    _fact("vllm_seam/lora.py", "vllm.lora.peft_helper:PEFTHelper.vllm_lora_scaling_factor", (ADAPTER,)),
    _fact("vllm_seam/lora.py", "vllm.lora.lora_model:LoRAModel", (ADAPTER,)),
    _fact("vllm_seam/lora.py", "vllm.lora.lora_model:LoRAModel.from_lora_tensors", (ADAPTER,), takes(3, "device", "dtype", "model_vocab_size", "weights_mapper")),
    _fact("vllm_seam/lora.py", "vllm.lora.lora_model:LoRAModel.is_3d_lora_weight", ()),
    _fact("vllm_seam/lora.py", "vllm.lora.utils:parse_fine_tuned_lora_name", (ADAPTER,), takes(2)),
    _fact("vllm_seam/lora.py", "vllm.config.model:ModelConfig.get_vocab_size", (ADAPTER,), takes(0)),
    _fact("vllm_seam/lora.py", f"{CONFIG}:VllmConfig.lora_config", (ADAPTER,)),
    _fact("vllm_seam/lora.py", "vllm.config.lora:MaxLoRARanks", (ADAPTER,), offers_only(1, 8, 16, 32, 64, 128, 256, 320, 512), "is the list of permitted_rank"),
    _fact("vllm_seam/lora.py", "vllm.model_executor.models.utils:WeightsMapper.get_rename_mapper", (ADAPTER,), takes(0), since="0.29", instead="get_unstacked_mapper"),
    _fact("vllm_seam/lora.py", "vllm.model_executor.models.utils:WeightsMapper.get_unstacked_mapper", (ADAPTER,), takes(0), until="0.28", instead="get_rename_mapper"),
    _fact("vllm_seam/lora.py", f"{MANAGER}._registered_adapters", (ADAPTER,)),
    _fact("vllm_seam/lora.py", "vllm.utils.cache:LRUCache.pin", (ADAPTER,), takes(1)),
    _fact("vllm_seam/lora.py", "vllm.utils.cache:LRUCache.pinned_items", (ADAPTER,)),
    _fact("vllm_seam/lora.py", f"{MANAGER}.packed_modules", (ADAPTER,)),
    _fact("vllm_seam/lora.py", f"{MANAGER}.modules", (ADAPTER,)),
    _fact("vllm_seam/lora.py", f"{MANAGER}.__init__", (ADAPTER,), says("self.model.lora_manager = self"), "is the model's lora_manager"),
    _fact("vllm_seam/lora.py", f"{MANAGER}.capacity", (ADAPTER,)),
    _fact("vllm_seam/lora.py", f"{MANAGER}.list_adapters", (ADAPTER,), takes(0)),
    _fact("vllm_seam/lora.py", "vllm.lora.model_manager:LRUCacheLoRAModelManager.add_adapter", (ADAPTER,), takes(1)),
    _fact("vllm_seam/lora.py", "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter", (ADAPTER,), takes(1)),
    _fact("vllm_seam/lora.py", f"{MANAGER}.remove_adapter", (ADAPTER,), takes(1)),
    _fact("vllm_seam/lora.py", "vllm.config.lora:LoRAConfig.max_lora_rank", (ADAPTER,)),
    _fact("vllm_seam/lora.py", "vllm.config.lora:LoRAConfig.lora_dtype", (ADAPTER,)),
    _fact("receive/served.py", f"{CONFIG}:VllmConfig.lora_config", (ADAPTER,)),
    _fact("vllm_seam/lora.py", f"{WORKER}.finish_weight_update", (), says("reset_lora_state"), "drops adapters (so a commit comes after it)", since="0.28", instead="they stay; a commit comes after it either way"),
]  # fmt: skip

RECEIVE = (*_ENGINE, *_TWIN, *_RELOAD, *_LORA)
