"""Names: PEFT's patterns one by one, then whole models against `save_pretrained`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lorasync.names import CheckpointLayout, Group, checkpoint_name
from lorasync.source import MergedSource
from lorasync.source.plan import slots
from tests.tiny import ARCHITECTURES, adapt, build, same_bits

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"
P = "base_model.model."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{P}{Q}.base_layer.weight", f"{Q}.weight"),
        (f"{P}{Q}.base_layer.bias", f"{Q}.bias"),
        (f"{P}{Q}.weight", f"{Q}.weight"),
        (f"{Q}.weight", f"{Q}.weight"),
        (f"module.{P}{Q}.base_layer.weight", f"{Q}.weight"),
        (f"module.module.{P}{Q}.base_layer.weight", f"{Q}.weight"),
        (f"_orig_mod.{P}{Q}.base_layer.weight", f"{Q}.weight"),
        (f"{P}model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.base_layer.weight", f"{Q}.weight"),
        (f"{P}model.layers.0._fsdp_wrapped_module.self_attn.q_proj.base_layer.weight", f"{Q}.weight"),
        (f"{P}{Q}.lora_A.default.weight", None),
        (f"{P}{Q}.lora_B.policy.weight", None),
        (f"{P}{Q}.lora_B.policy.bias", None),
        (f"{P}{Q}.lora_magnitude_vector.policy.weight", None),
        (f"{P}model.embed_tokens.lora_embedding_A.policy", None),
        (f"{P}model.embed_tokens.lora_embedding_B.policy", None),
        (f"{P}model.embed_tokens.base_layer.weight", "model.embed_tokens.weight"),
        (f"{P}{Q}.base_layer.weight.absmax", None),
        (f"{P}{Q}.base_layer.weight.quant_map", None),
        (f"{P}{Q}.base_layer.weight.nested_absmax", None),
        (f"{P}{Q}.base_layer.weight.nested_quant_map", None),
        (f"{P}{Q}.base_layer.weight.quant_state.bitsandbytes__nf4", None),
        (f"{P}{Q}.base_layer.SCB", None),
        (f"{P}{Q}.base_layer.weight_format", None),
        (f"{P}lm_head.original_module.weight", None),
        (f"{P}lm_head.modules_to_save.default.weight", "lm_head.weight"),
        (f"{P}score.modules_to_save.my-adapter_2.dense.bias", "score.dense.bias"),
        (f"{P}model.embed_tokens.token_adapter.base_layer.weight", "model.embed_tokens.weight"),
        (f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta.default", None),
        (f"{P}model.embed_tokens.token_adapter.trainable_tokens_original.default", None),
        (f"{P}model.layers.0.mlp.experts.base_layer.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"),
        (
            f"{P}model.layers.0.mlp.experts.base_layer.base_layer.down_proj",
            "model.layers.0.mlp.experts.down_proj",
        ),
        (f"{P}attn.base_layer.in_proj_weight", "attn.in_proj_weight"),
        (f"{P}attn.base_layer.out_proj.base_layer.weight", "attn.out_proj.weight"),
        (f"{P}conv.parametrizations.weight.original0", "conv.parametrizations.weight.original0"),
        # Only whole segments count.
        (f"{P}my_base_layer.weight", "my_base_layer.weight"),
        (f"{P}explora_A.weight", "explora_A.weight"),
        (f"{P}modules_to_save_head.weight", "modules_to_save_head.weight"),
        (f"{P}{Q}.hada_w1_a.default", None),
        (f"{P}{Q}.vera_lambda_b.default", None),
        ("prompt_encoder.default.embedding.weight", None),
    ],
)
def test_every_pattern(name: str, expected: str | None) -> None:
    assert checkpoint_name(name) == expected


def test_saved_modules_of_other_adapters_have_no_name() -> None:
    name = f"{P}lm_head.modules_to_save.policy.weight"
    assert checkpoint_name(name, adapters={"policy"}) == "lm_head.weight"
    assert checkpoint_name(name, adapters={"other"}) is None


def test_every_parameter_of_every_peft_method_is_known() -> None:
    import importlib
    import pkgutil

    import peft.tuners
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in pkgutil.walk_packages(peft.tuners.__path__, "peft.tuners."):
        if not module.name.endswith(("lora.gptq", "inc")):
            importlib.import_module(module.name)

    def below(cls: type) -> list[type]:
        return [cls, *(deep for child in cls.__subclasses__() for deep in below(child))]

    kinds: list[Any] = below(BaseTunerLayer)
    found = {name for kind in kinds for name in kind.adapter_layer_names}
    assert len(found) > 50
    assert [name for name in sorted(found) if checkpoint_name(f"{P}{Q}.{name}.policy") is not None] == []


adapter_names = st.from_regex(r"[A-Za-z0-9_\-]{1,12}", fullmatch=True)
paths = st.lists(
    st.sampled_from(["model", "layers", "0", "17", "q_proj", "mlp", "weights"]), min_size=1, max_size=6
)


@settings(max_examples=50, deadline=None)
@given(path=paths, adapter=adapter_names)
def test_any_path_and_any_adapter_name(path: list[str], adapter: str) -> None:
    plain = ".".join(path)
    assert checkpoint_name(f"{P}{plain}.base_layer.weight") == f"{plain}.weight"
    assert checkpoint_name(f"{P}{plain}.modules_to_save.{adapter}.weight") == f"{plain}.weight"
    assert checkpoint_name(f"{P}{plain}.lora_A.{adapter}.weight") is None


def _loaded(name: str, path: Path) -> Any:
    model = build(name)
    model.save_pretrained(path)
    return type(model).from_pretrained(path, dtype=torch.bfloat16)


@pytest.mark.parametrize("loaded", [False, True], ids=["from config", "from disk"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_stream_is_what_save_pretrained_writes(name: str, loaded: bool, tmp_path: Path) -> None:
    base = _loaded(name, tmp_path / "base") if loaded else build(name)
    config = {"task_type": "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"}
    model = adapt(base, **config)
    source = MergedSource(model)
    ours = dict(source)
    copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not same_bits(ours[name], theirs[name])] == []
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
        (name, t.dtype, tuple(t.shape)) for name, t in ours.items()
    ]


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "t5"])
def test_checkpoint_name_agrees_with_the_walk_over_modules(name: str) -> None:
    model = adapt(build(name))
    by_name = {checkpoint_name(n) for n, _ in model.named_parameters(remove_duplicate=False)} - {None}
    parameters = {
        slot.name for slot in slots(model.base_model.model, None) if isinstance(slot.held, nn.Parameter)
    }
    assert by_name == parameters


# --- transformers' reverse conversions ----------------------------------------------------------------------


class _Converted(nn.Module):
    """A model as `from_pretrained` leaves it, with conversions of our own."""

    config = None

    def __init__(self, *conversions: Any) -> None:
        super().__init__()
        self._weight_conversions = list(conversions)


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_tensors_that_become_one_are_grouped_across_others() -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    layout = CheckpointLayout(
        _Converted(WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)]))
    )
    names = [
        "0.q.weight",
        "0.norm.weight",
        "0.k.weight",
        "0.v.weight",
        "1.q.weight",
        "1.k.weight",
        "1.v.weight",
    ]
    groups = layout.groups({name: _meta(2, 4) for name in names})
    assert [group.members for group in groups] == [
        ("0.q.weight", "0.k.weight", "0.v.weight"),
        ("0.norm.weight",),
        ("1.q.weight", "1.k.weight", "1.v.weight"),
    ]
    assert groups[0].outputs == (("0.qkv.weight", torch.float32, (6, 4)),)
    parts = {name: torch.full((2, 4), float(i)) for i, name in enumerate(groups[0].members)}
    assert layout.convert(parts)["0.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_renames_are_told_from_conversions() -> None:
    from transformers.core_model_loading import WeightRenaming

    layout = CheckpointLayout(_Converted(WeightRenaming("old.", "new.")))
    groups = layout.groups({"new.weight": _meta(2), "other.weight": _meta(3)})
    assert groups[0] == Group(("new.weight",), (("old.weight", torch.float32, (2,)),), renamed=True)
    assert groups[1].outputs[0][0] == "other.weight"


def test_what_a_quantizer_converted_is_not_reverted(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    plain = build("qwen3-moe")
    plain.save_pretrained(tmp_path / "plain")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    once = type(plain).from_pretrained(tmp_path / "plain", quantization_config=four_bit, dtype=torch.bfloat16)
    once.save_pretrained(tmp_path / "packed")
    packed = type(plain).from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    theirs = load_file(tmp_path / "plain" / "model.safetensors")
    for model in (once, packed):
        ours = {meta.name: meta.shape for meta in MergedSource(adapt(model)).metadata()}
        assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
