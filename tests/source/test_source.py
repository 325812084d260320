"""`MergedSource` against PEFT's own merge, variant by variant and base by base."""

from __future__ import annotations

import copy
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as lora_config
from torch import nn

from lorasync.errors import AdapterError, MismatchError, NonFiniteError, UnmergeableError
from lorasync.merge import Stochastic
from lorasync.source import FactorSource, MergedSource, unwrap
from lorasync.source.parameter import packing, read
from tests.tiny import adapt, build, fill, same_bits, snapshot, unchanged

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [torch.float32, torch.bfloat16]


class Zoo(nn.Module):
    """One of every layer that LoRA has a class for."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 6)
        self.nobias = nn.Linear(8, 6, bias=False)
        self.emb = nn.Embedding(10, 8)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.conv3 = nn.Conv3d(4, 6, 2)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.ln = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.ln(self.lin0(x)))


def zoo(dtype: torch.dtype) -> Zoo:
    torch.manual_seed(0)
    return Zoo().to(dtype)


def peft_merged(model: Any, adapters: list[str] | None = None) -> dict[str, torch.Tensor]:
    """What PEFT's `merge_and_unload` makes of a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(copy.deepcopy(model).merge_and_unload(adapter_names=adapters).state_dict())


def check_against_peft(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Our stream has PEFT's names and bits, metadata equals iteration, twice, and the model is untouched."""
    before = snapshot(model)
    source = MergedSource(model, **options)
    ours = dict(source)
    assert unchanged(model, before)
    wanted = options.get("adapter")
    theirs = peft_merged(model, [wanted] if isinstance(wanted, str) else wanted)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not same_bits(ours[name], theirs[name])] == []
    for _ in range(2):
        described = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
        assert described == [(name, t.dtype, tuple(t.shape)) for name, t in source]
    return ours


LORA = {
    "linear": {"target_modules": ["lin", "nobias"]},
    "rslora": {"target_modules": ["lin"], "use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["lin", "nobias"],
        "rank_pattern": {"lin": 2},
        "alpha_pattern": {"nobias": 9},
    },
    "embedding": {"target_modules": ["emb"]},
    "conv": {"target_modules": ["conv1", "conv2", "pointwise", "conv3"]},
    "attention": {"target_modules": ["mha"]},
    "dora": {"target_modules": ["lin", "emb"], "use_dora": True},
    "dora conv": {"target_modules": ["conv1", "conv2", "pointwise", "conv3"], "use_dora": True},
    "lora_bias": {"target_modules": ["lin", "conv2"], "lora_bias": True},
    "saved": {"target_modules": ["lin"], "modules_to_save": ["norm", "nobias"]},
    "tokens": {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 5, 7]}},
    "bias all": {"target_modules": ["lin"], "bias": "all"},
    "parameter": {"target_modules": ["lin"], "target_parameters": ["nobias.weight"]},
    "pissa": {"target_modules": ["nobias"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["nobias"], "init_lora_weights": "olora"},
    "gaussian": {"target_modules": ["lin"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("cast", [True, False], ids=["fp32 factors", "factors like the base"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(LORA))
def test_every_lora_is_peft_bit_for_bit(kind: str, dtype: torch.dtype, cast: bool) -> None:
    model = adapt(zoo(dtype), cast=cast, **{"lora_alpha": 3, **LORA[kind]})
    ours = check_against_peft(model)
    base = dict(zoo(dtype).state_dict())
    assert any(not torch.equal(ours[name], base[name]) for name in base)


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
def test_gpt2s_transposed_layers(dtype: torch.dtype, cast: bool, dora: bool) -> None:
    config = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": dora}
    model = adapt(build("gpt2", dtype), cast=cast, **config)
    ours, theirs = dict(MergedSource(model)), peft_merged(model)
    assert [name for name in ours if not same_bits(ours[name], theirs[name])] == []


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_experts(dtype: torch.dtype, cast: bool) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapt(build("qwen3-moe", dtype), cast=cast, target_modules=["q_proj"], target_parameters=experts)
    before = snapshot(model)
    ours = dict(MergedSource(model))
    assert unchanged(model, before)
    merged = copy.deepcopy(model).merge_and_unload()
    theirs = revert_weight_conversion(merged, merged.state_dict())
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not same_bits(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_adapters_merge_in_order(dtype: torch.dtype) -> None:
    model = adapt(zoo(dtype), "first", target_modules=["lin", "emb", "conv2"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lin", "emb", "nobias"]))
    fill(model, 2)
    model.base_model.set_adapter(["first", "second"])
    both = check_against_peft(model)
    check_against_peft(model, adapter=["second", "first"])
    one = check_against_peft(model, adapter="second")
    assert not same_bits(both["lin.weight"], one["lin.weight"])
    model.add_weighted_adapter(["first", "second"], [0.3, 0.7], "mixed", combination_type="cat")
    check_against_peft(model, adapter="mixed")


def test_dora_beside_lora_takes_its_norm_from_the_pristine_base() -> None:
    # PEFT unmerges and merges again in place to get at the base, which rounds; we have the base itself.
    model = adapt(zoo(torch.bfloat16), "plain", target_modules=["lin"])
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["lin"], use_dora=True))
    fill(model, 2)
    ours = dict(MergedSource(model, adapter=["plain", "dora"]))["lin.weight"]
    layer = model.base_model.model.lin
    base, plain, dora = (
        t.double() for t in (layer.base_layer.weight, *map(layer.get_delta_weight, ["plain", "dora"]))
    )
    magnitude = layer.lora_magnitude_vector["dora"].weight.double() / (base + dora).norm(dim=1)
    exact = magnitude[:, None] * (base + plain + dora)
    theirs = peft_merged(model, ["plain", "dora"])["lin.weight"]
    assert (ours.double() - exact).norm() <= (theirs.double() - exact).norm()
    assert torch.allclose(ours.double(), exact, rtol=2**-6, atol=1e-3)


def test_attention_is_the_policy_that_was_trained() -> None:
    # PEFT adds the output projection's delta twice, when training too: what we yield must compute the same.
    model = adapt(zoo(torch.float32), target_modules=["mha"]).eval()
    x = torch.randn(2, 3, 8)
    plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain.load_state_dict(
        {name.removeprefix("mha."): t for name, t in MergedSource(model) if name.startswith("mha.")}
    )
    assert torch.allclose(plain(x, x, x)[0], model.base_model.model.mha(x, x, x)[0], atol=1e-6)


def test_scale_is_read_from_the_layer_at_each_pass() -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin"])
    source = MergedSource(model)
    before = dict(source)["lin.weight"]
    model.base_model.model.lin.scale_layer(0.5)
    assert not same_bits(dict(source)["lin.weight"], before)
    check_against_peft(model)


def test_an_adapter_of_any_name_and_the_saved_modules_of_the_right_one() -> None:
    model = adapt(zoo(torch.float32), "my-policy_2", target_modules=["lin"], modules_to_save=["norm"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"]))
    fill(model, 3)
    mine = dict(MergedSource(model, adapter="my-policy_2"))["norm.weight"]
    other = dict(MergedSource(model, adapter="other"))["norm.weight"]
    assert same_bits(mine, model.base_model.model.norm.modules_to_save["my-policy_2"].weight)
    assert same_bits(other, model.base_model.model.norm.modules_to_save["other"].weight)
    model.set_adapter("other")
    check_against_peft(model)


# --- PEFT's other methods -----------------------------------------------------------------------------------

T = ["lin0", "lin1"]
METHODS: dict[str, Any] = {
    "adamss": lambda: peft.AdamssConfig(target_modules=T, r=4, num_subspaces=2),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=T, total_step=10, init_r=4),
    "loha": lambda: peft.LoHaConfig(target_modules=T, r=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=T, r=4),
    "vera": lambda: peft.VeraConfig(target_modules=T, r=8),
    "oft": lambda: peft.OFTConfig(target_modules=T, oft_block_size=4),
    "boft": lambda: peft.BOFTConfig(target_modules=T, boft_block_size=4),
    "ia3": lambda: peft.IA3Config(target_modules=T, feedforward_modules=["lin1"]),
    "hira": lambda: peft.HiraConfig(target_modules=T, r=4),
    "miss": lambda: peft.MissConfig(target_modules=T, r=4),
    "randlora": lambda: peft.RandLoraConfig(target_modules=T, r=4),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=T, n_frequency=8),
    "c3a": lambda: peft.C3AConfig(target_modules=T, block_size=4),
    "shira": lambda: peft.ShiraConfig(target_modules=T, r=2),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=T, r=2, vector_length=4, num_vectors=8),
    "hra": lambda: peft.HRAConfig(target_modules=T, r=4),
    "ln": lambda: peft.LNTuningConfig(target_modules=["ln"]),
    "road": lambda: peft.RoadConfig(target_modules=T, group_size=4),
    "delora": lambda: peft.DeloraConfig(target_modules=T, r=4),
    "waveft": lambda: peft.WaveFTConfig(target_modules=T, n_frequency=8),
    "gralora": lambda: peft.GraloraConfig(target_modules=T, r=4, gralora_k=2),
    "osf": lambda: peft.OSFConfig(target_modules=T),
    "psoft": lambda: peft.PsoftConfig(target_modules=T, r=4),
    "deft": lambda: peft.DeftConfig(target_modules=T),
    "beft": lambda: peft.BeftConfig(target_modules=T),
    "frod": lambda: peft.FrodConfig(target_modules=T),
    "glora": lambda: peft.GloraConfig(target_modules=T),
    "peanut": lambda: peft.PeanutConfig(target_modules=T),
    "pvera": lambda: peft.PveraConfig(target_modules=T),
    "supertuning": lambda: peft.SupertuningConfig(target_modules=T),
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=T),
    "unilora": lambda: peft.UniLoraConfig(target_modules=T),
    "lora kasa": lambda: LoraConfig(target_modules=T, r=4, kasa_config=lora_config.KasaConfig()),
    "lora monteclora": lambda: LoraConfig(
        target_modules=T, r=4, monteclora_config=lora_config.MontecloraConfig()
    ),
    "lora velora": lambda: LoraConfig(target_modules=T, r=4, velora_config=lora_config.VeloraConfig()),
    "lora mica": lambda: LoraConfig(target_modules=T, r=4, init_lora_weights="mica"),
    "lora bdlora": lambda: LoraConfig(
        target_modules=T,
        r=4,
        use_bdlora=lora_config.BdLoraConfig(
            target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2
        ),
    ),
}


def mlp(dtype: torch.dtype, config: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fill(get_peft_model(Mlp().to(dtype), config)).eval()


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaMSS groups its directions with scikit-learn's KMeans when it starts; any grouping will do."""
    fake: Any = ModuleType("sklearn")
    fake.cluster = cluster = ModuleType("sklearn.cluster")
    cluster.KMeans = lambda n_clusters, **_: SimpleNamespace(
        fit_predict=lambda x: np.arange(len(x)) % n_clusters
    )
    monkeypatch.setitem(sys.modules, "sklearn", fake)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", cluster)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", list(METHODS))
def test_every_other_method_of_peft_merges_on_a_copy(method: str, dtype: torch.dtype) -> None:
    ours = check_against_peft(mlp(dtype, METHODS[method]()))
    torch.manual_seed(0)
    base = Mlp().to(dtype).state_dict()
    assert any(not torch.equal(ours[name], base[name]) for name in base)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lambda: peft.LilyConfig(target_modules=T), "not supported for Lily"),
        (lambda: LoraConfig(target_modules=T, alora_invocation_tokens=[1, 2]), "aLoRA"),
    ],
)
def test_what_has_no_merge_is_refused_before_anything_is_yielded(config: Any, says: str) -> None:
    for check_finite in (True, False):
        with pytest.raises((UnmergeableError, AdapterError), match=says):
            next(iter(MergedSource(mlp(torch.float32, config()), check_finite=check_finite)))


def test_grouped_convolutions_and_biases_without_a_place_are_refused() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(grouped, LoraConfig(r=4, target_modules=["0"]))
        homeless = get_peft_model(zoo(torch.float32), LoraConfig(target_modules=["nobias"], lora_bias=True))
    with pytest.raises(UnmergeableError, match="groups=2"):
        MergedSource(model)
    with pytest.raises(UnmergeableError, match=r"nobias.*lora_bias"):
        MergedSource(homeless)


def test_an_arrow_router_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    for name in ("one", "two"):
        get_peft_model(build("llama"), config, adapter_name=name).save_pretrained(tmp_path)
    paths = [str(tmp_path / name) for name in ("one", "two")]
    model = peft.create_arrow_model(build("llama"), paths, peft.ArrowConfig(top_k=1))
    with pytest.raises(UnmergeableError, match=r"q_proj.*Arrow routes every token"):
        MergedSource(model)


def test_replicated_layers_are_refused() -> None:
    model = adapt(build("llama"), target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    with pytest.raises(UnmergeableError, match="layer_replication"):
        MergedSource(model)


CAUSAL = {"task_type": "CAUSAL_LM"}
VIRTUAL = {**CAUSAL, "num_virtual_tokens": 4}
NO_WEIGHTS: dict[str, Any] = {
    "prompt_tuning": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "multitask_prompt_tuning": lambda: peft.MultitaskPromptTuningConfig(num_tasks=2, **VIRTUAL),
    "p_tuning": lambda: peft.PromptEncoderConfig(**VIRTUAL),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "cartridge": lambda: peft.CartridgeConfig(**VIRTUAL),
    "cpt": lambda: peft.CPTConfig(
        cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **CAUSAL
    ),
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **CAUSAL),
    "poly": lambda: peft.PolyConfig(r=2, target_modules=["q_proj"]),
    "shadow": lambda: peft.ShadowConfig(r=2, shadow_num_hidden_layers=1, **CAUSAL),
}


@pytest.mark.parametrize("kind", list(NO_WEIGHTS))
def test_what_acts_on_activations_is_refused_with_the_alternative(kind: str) -> None:
    model = get_peft_model(build("llama"), NO_WEIGHTS[kind]())
    with pytest.raises(UnmergeableError, match=f"{kind.upper()}.*serve it with PEFT"):
        MergedSource(model)


def test_an_adapter_of_a_whole_block_is_refused_where_its_kind_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorasync.source.trained._ON_ACTIVATIONS", set())
    with pytest.raises(UnmergeableError, match=r"model\.layers\.0: .*ShadowLayer.*whole block"):
        MergedSource(get_peft_model(build("llama"), NO_WEIGHTS["shadow"]()))


@pytest.mark.usefixtures("clusters")
def test_every_kind_of_adapter_that_peft_has_is_merged_or_refused_here() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {make().peft_type.value for make in [*METHODS.values(), *NO_WEIGHTS.values()]}
    elsewhere = {"LORA", "LILY", "TRAINABLE_TOKENS"}  # above and below
    elsewhere |= {"XLORA"}  # needs trained adapters on disk to be built; refused by the same line as POLY
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == known | elsewhere


def test_trained_tokens_alone() -> None:
    config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 4])
    model = fill(get_peft_model(build("llama"), config))
    changed = (
        check_against_peft(model)["model.embed_tokens.weight"] != build("llama").model.embed_tokens.weight
    )
    assert changed.any(dim=1).nonzero().flatten().tolist() == [1, 4]


def test_a_mixed_model() -> None:
    model: Any = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]), "one", mixed=True)
    assert {name.split(".")[2] for name, _ in FactorSource(model)} == {"model"}
    model.add_adapter("two", peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["one", "two"])
    check_against_peft(fill(model))


# --- quantized bases ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return path


BASES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bf16 storage": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantized(path: Path, kind: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **BASES[kind])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize("cast", [True, False], ids=["fp32 factors", "bf16 factors"])
@pytest.mark.parametrize("kind", list(BASES))
def test_a_quantized_base_is_dequantized_and_rounded_once(kind: str, cast: bool, llama_on_disk: Path) -> None:
    model = adapt(quantized(llama_on_disk, kind), cast=cast, target_modules=["q_proj", "up_proj", "lm_head"])
    before = snapshot(model)
    ours = dict(MergedSource(model))
    assert unchanged(model, before)
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and name:
            base = read(module.base_layer, "weight", name=name)
            a, b = (part["default"].weight.float() for part in (module.lora_A, module.lora_B))
            delta = b @ a * module.scaling["default"]
            if (
                packing(module.base_layer, "weight") == "plain"
            ):  # PEFT has a result there, and rounds its delta
                delta = delta.to(module.lora_B["default"].weight.dtype)
            expected = (base + delta).to(torch.bfloat16)
            assert same_bits(ours[f"{name}.weight"], expected), name
    untouched = model.base_model.model.model.layers[0].mlp.down_proj
    assert same_bits(
        ours["model.layers.0.mlp.down_proj.weight"], read(untouched, "weight", name="").bfloat16()
    )


def test_four_bit_dequantization_is_the_code_times_the_scale(llama_on_disk: Path) -> None:
    layer = quantized(llama_on_disk, "nf4").model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    packed = layer.weight.data.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1).long()
    exact = (state.code[codes].view(-1, state.blocksize) * state.absmax[:, None]).view(state.shape)
    assert same_bits(read(layer, "weight", name="w"), exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    "method", ["adalora", "vera", "ia3", "oft", "randlora", "boft", "hira", "road", "miss", "lokr"]
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_other_methods_on_a_quantized_base_equal_those_on_its_dequantized_twin(
    method: str, kind: str, llama_on_disk: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = METHODS[method]()
    config.target_modules = ["q_proj"]
    config.__dict__.pop("feedforward_modules", None)
    packed = quantized(llama_on_disk, kind)
    twin = AutoModelForCausalLM.from_pretrained(llama_on_disk, dtype=torch.bfloat16)
    for mine, theirs in zip(packed.model.layers, twin.model.layers, strict=True):
        weight = read(mine.self_attn.q_proj, "weight", name="")
        theirs.self_attn.q_proj.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model, reference = (_with(m, copy.deepcopy(config)) for m in (packed, twin))
    state = {
        name: t for name, t in model.state_dict().items() if "base_layer" not in name and "q_proj" in name
    }
    reference.load_state_dict(state, strict=False)
    before = snapshot(model)
    ours = dict(MergedSource(model))
    assert unchanged(model, before)
    for name, theirs in peft_merged(reference).items():
        if "q_proj" in name:
            assert same_bits(ours[name], theirs.to(torch.bfloat16)), name


def _with(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fill(get_peft_model(model, config))


def test_a_repacked_or_foreign_weight_is_refused(llama_on_disk: Path) -> None:
    model = adapt(quantized(llama_on_disk, "nf4"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(AdapterError, match=r"q_proj.*AVX512.*support_avx512bf16_for_cpu"):
        dict(MergedSource(model))


# --- tied weights -------------------------------------------------------------------------------------------


def test_tied_and_untouched_is_emitted_once() -> None:
    model = adapt(build("llama-tied"))
    assert "lm_head.weight" not in dict(MergedSource(model))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_side_of_a_tie_is_refused_or_untied(target: str) -> None:
    model = adapt(build("llama-tied"), target_modules=[target])
    with pytest.raises(MismatchError, match=r"lm_head\.weight.*ensure_weight_tying"):
        MergedSource(model)
    base = model.base_model.model.get_input_embeddings().weight
    ours = dict(MergedSource(model, untie=True))
    other = {"embed_tokens": "lm_head.weight", "lm_head": "model.embed_tokens.weight"}[target]
    adapted = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}[target]
    assert same_bits(ours[other], base)
    assert not same_bits(ours[adapted], base)


def test_both_sides_adapted_alike_get_the_update_once() -> None:
    model = adapt(
        build("llama-tied", torch.float32), target_modules=["embed_tokens"], ensure_weight_tying=True
    )
    inner = model.base_model.model
    emb, head = inner.model.embed_tokens, inner.lm_head
    head.lora_A["default"].weight.data = emb.lora_embedding_B["default"].data.T.clone()
    head.lora_B["default"].weight.data = emb.lora_embedding_A["default"].data.T.clone()
    ours = dict(MergedSource(model))
    assert "lm_head.weight" not in ours
    once = emb.base_layer.weight + emb.get_delta_weight("default")
    assert same_bits(ours["model.embed_tokens.weight"], once)
    head.lora_B["default"].weight.data[0, 0] += 1
    with pytest.raises(MismatchError, match=r"lm_head\.weight"):
        next(iter(MergedSource(model)))


def test_tied_trained_tokens_and_tied_saved_modules() -> None:
    tokens = adapt(build("llama-tied"), target_modules=["q_proj"], trainable_token_indices=[1, 5])
    ours = dict(MergedSource(tokens))
    assert "lm_head.weight" not in ours
    delta = tokens.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert same_bits(ours["model.embed_tokens.weight"][[1, 5]], delta.to(torch.bfloat16))
    saved = adapt(build("llama-tied"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(MismatchError, match=r"lm_head\.weight.*untie=True"):
        MergedSource(saved)
    assert "lm_head.weight" in dict(MergedSource(saved, untie=True))


# --- bad input ----------------------------------------------------------------------------------------------


def test_a_model_without_an_adapter_and_an_unknown_adapter() -> None:
    with pytest.raises(AdapterError, match="without an adapter"):
        MergedSource(build("llama"))
    with pytest.raises(AdapterError, match=r"'nobody'.*\['default'\]"):
        MergedSource(adapt(build("llama")), adapter="nobody")
    with pytest.raises(TypeError, match="expected a module"):
        MergedSource(object())
    with pytest.raises(TypeError, match="expected a module"):
        MergedSource("model")


def test_an_adapter_that_is_merged_or_disabled() -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin"])
    source = MergedSource(model)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        next(iter(source))
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(AdapterError, match="disabled"):
        next(iter(source))
    next(iter(source))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_with_every_name_before_anything(bad: float) -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin", "nobias", "emb"])
    inner = model.base_model.model
    with torch.no_grad():
        inner.lin.lora_A["default"].weight[0, 0] = bad
        inner.emb.lora_embedding_B["default"][1, 0] = bad
        inner.nobias.base_layer.weight[2, 2] = bad
        inner.norm.running_mean[0] = bad
    source = MergedSource(model)
    with pytest.raises(NonFiniteError) as caught:
        next(iter(source))
    for name in ("lin.weight (default, A)", "emb.weight (default, B)", "nobias.weight", "norm.running_mean"):
        assert name in str(caught.value)
    assert len(dict(MergedSource(model, check_finite=False))) > 0


def test_a_frozen_weight_that_goes_bad_later_is_found() -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin"])
    source = MergedSource(model)
    dict(source)
    with torch.no_grad():
        model.base_model.model.nobias.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"nobias\.weight"):
        next(iter(source))


def test_a_merge_that_overflows_the_served_dtype_is_refused() -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin"])
    with torch.no_grad():
        model.base_model.model.lin.lora_A["default"].weight.fill_(300.0)
        model.base_model.model.lin.lora_B["default"].weight.fill_(300.0)
    assert dict(MergedSource(model, dtype=torch.bfloat16))
    with pytest.raises(NonFiniteError, match=r"lin\.weight"):
        next(iter(MergedSource(model, dtype=torch.float16)))


def test_a_tensor_of_the_wrong_shape_is_refused() -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin", "nobias"])
    model.base_model.model.lin.lora_A["default"].weight = nn.Parameter(torch.randn(4, 7))
    model.base_model.model.nobias.lora_B["default"].weight = nn.Parameter(torch.randn(6, 3))
    with pytest.raises(MismatchError, match=r"lin\.weight \(default\).*\n.*nobias"):
        next(iter(MergedSource(model)))


# --- the stream ---------------------------------------------------------------------------------------------


def test_yielded_tensors_belong_to_the_consumer() -> None:
    model = adapt(build("llama"), modules_to_save=["norm"])
    before = snapshot(model)
    for _, tensor in MergedSource(model):
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        tensor.zero_()
    assert unchanged(model, before)


def test_iterating_leaves_gradients_and_grad_mode_alone() -> None:
    model = adapt(build("llama"))
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for _ in MergedSource(model):
        assert torch.is_grad_enabled()
    assert all(same_bits(grads[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)


def test_an_exception_half_way_leaves_the_model_as_it_was() -> None:
    model = adapt(build("llama"))
    before = snapshot(model)
    stream = iter(MergedSource(model))
    for _ in range(5):
        next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert unchanged(model, before)
    check_names = [name for name, _ in MergedSource(model)]
    assert check_names == [meta.name for meta in MergedSource(model).metadata()]


def test_dtype_casts_floats_once_and_nothing_else() -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin"])
    ours = dict(MergedSource(model, dtype=torch.bfloat16))
    exact = dict(MergedSource(model))
    assert same_bits(ours["lin.weight"], exact["lin.weight"].to(torch.bfloat16))
    assert ours["norm.num_batches_tracked"].dtype == torch.int64
    assert {m.dtype for m in MergedSource(model, dtype=torch.float64).metadata()} == {
        torch.float64,
        torch.int64,
    }


def test_injected_adapters_and_wrapped_models() -> None:
    model = build("llama")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "policy")
    fill(model)
    names = {name for name, _ in MergedSource(model, adapter="policy")}
    assert names == set(build("llama").state_dict())

    class Engine:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

    assert unwrap(Engine(nn.DataParallel(model))) is model
    assert unwrap(torch.compile(model)) is model


def test_stochastic_rounding_is_reproducible_and_off_for_what_is_frozen() -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin"])
    with torch.no_grad():
        for part in ("lora_A", "lora_B"):
            getattr(model.base_model.model.lin, part)["default"].weight.mul_(0.01)
    one, same, other = (
        dict(MergedSource(model, dtype=torch.bfloat16, rounding=Stochastic(seed))) for seed in (1, 1, 2)
    )
    assert all(same_bits(one[name], same[name]) for name in one)
    assert not same_bits(one["lin.weight"], other["lin.weight"])
    assert same_bits(one["conv3.weight"], other["conv3.weight"])


def test_delta_survival_reports_each_adapted_tensor() -> None:
    model = adapt(build("llama"), target_modules=["q_proj", "up_proj"])
    reports = {report.name: report for report in MergedSource(model).delta_survival()}
    assert len(reports) == 4
    assert all(0.9 < report.kept < 1.1 for report in reports.values())
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.mul_(1e-5)
    reports = {report.name: report for report in MergedSource(model).delta_survival()}
    assert reports["model.layers.0.self_attn.q_proj.weight"].kept < 0.1
    assert reports["model.layers.0.self_attn.q_proj.weight"].unmoved > 0.9


def test_a_thousand_syncs_leave_the_model_bit_identical() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 4)).to(torch.bfloat16)
    model = adapt(net, target_modules=["0", "1"], modules_to_save=["2"])
    before = snapshot(model)
    source = MergedSource(model)
    first = dict(source)
    for _ in range(999):
        for _ in source:
            pass
    last = dict(source)
    assert unchanged(model, before)
    assert all(same_bits(first[name], last[name]) for name in first)


TARGETS = ["lin", "nobias", "emb", "conv1", "conv2", "pointwise", "conv3"]


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 6),
    alpha=st.integers(1, 40),
    targets=st.sets(st.sampled_from(TARGETS), min_size=1),
    second=st.sets(st.sampled_from(TARGETS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cast=st.booleans(),
    rslora=st.booleans(),
    dora=st.booleans(),
    saved=st.booleans(),
)
def test_any_mix_of_adapters_is_peft_bit_for_bit(
    r: int,
    alpha: int,
    targets: set[str],
    second: set[str],
    dtype: torch.dtype,
    cast: bool,
    rslora: bool,
    dora: bool,
    saved: bool,
) -> None:
    first = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "use_dora": dora}
    extra = {"modules_to_save": ["norm"]} if saved else {}
    model = adapt(zoo(dtype), "first", cast=cast, target_modules=sorted(targets), **first, **extra)
    if second:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter(
                "second", LoraConfig(r=r + 1, target_modules=sorted(second)), autocast_adapter_dtype=cast
            )
        fill(model, 2)
        model.base_model.set_adapter(["first", "second"])
    check_against_peft(model)
