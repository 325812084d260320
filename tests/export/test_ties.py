"""Tied weights on the way to disk: what is stored twice is written twice alike, what differs is refused or written apart."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasync.errors import LorasyncError, MismatchError
from lorasync.export import merge_to_disk
from lorasync.merge import Stochastic
from lorasync.source import FactorSource, MergedSource
from tests.export.test_export import stored
from tests.packed_bases import rewrite
from tests.tiny import adapt, build, same_bits

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VALUES = {"target_modules": ["v_proj"]}
# What is trained, and whether both sides of the tie get the same values.
TRAINED: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing of it": (VALUES, True),
    "tokens": ({**VALUES, "trainable_token_indices": [1, 5]}, True),
    "tokens of both": (
        {**VALUES, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}},
        True,
    ),
    "other tokens": (
        {**VALUES, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 6]}},
        False,
    ),
    "tokens of the head": ({**VALUES, "trainable_token_indices": {"lm_head": [1, 5]}}, False),
    "embedding": ({"target_modules": ["embed_tokens"]}, False),
    "head": ({"target_modules": ["lm_head", "v_proj"]}, False),
    "both, not alike": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "both alike": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "both alike, for the head": ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, True),
    "saved alike": ({**VALUES, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "saved embedding": ({**VALUES, "modules_to_save": ["embed_tokens"]}, False),
    "saved head": ({**VALUES, "modules_to_save": ["lm_head"]}, False),
    "both saved": ({**VALUES, "modules_to_save": ["embed_tokens", "lm_head"]}, False),
}
STORED = ["embedding", "head", "both"]


def quiet(function: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def tied(path: Path, config: dict[str, Any], alike: bool, held: str) -> tuple[Path, Path]:
    """A tied base that stores the weight under one name or both, and an adapter."""
    base = build("llama-tied")
    base.save_pretrained(path / "base")

    def store(tensors: dict[str, torch.Tensor]) -> None:
        if held != "embedding":
            tensors[HEAD] = tensors[EMBED].clone()
        if held == "head":
            del tensors[EMBED]

    rewrite(path / "base", store)
    model = adapt(base, **config)
    if alike and config.get("ensure_weight_tying") and "modules_to_save" not in config:
        _tie(model)
    quiet(model.save_pretrained, path / "adapter")
    return path / "base", path / "adapter"


def _tie(model: Any) -> None:
    inner = model.base_model.model
    embedding, head = inner.model.embed_tokens, inner.lm_head
    with torch.no_grad():
        head.lora_A["default"].weight.copy_(embedding.lora_embedding_B["default"].T)
        head.lora_B["default"].weight.copy_(embedding.lora_embedding_A["default"].T)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(6).view(1, 6)).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("held", STORED)
@pytest.mark.parametrize("trained", [name for name, (_, alike) in TRAINED.items() if alike])
def test_both_sides_get_the_same_values_and_no_name_is_left_old(
    trained: str, held: str, tmp_path: Path
) -> None:
    config, _ = TRAINED[trained]
    base, adapter = tied(tmp_path, config, True, held)
    out = merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)
    made, policy = stored(out), quiet(PeftModel.from_pretrained, load(base), adapter)
    names = [name for name in (EMBED, HEAD) if name in made]
    assert names == [name for name in (EMBED, HEAD) if name in stored(base)]
    assert all(same_bits(made[names[0]], made[name]) for name in names)
    if trained != "nothing of it":
        assert not torch.equal(made[names[0]], stored(base)[names[0]])
    assert torch.allclose(logits(load(out)), logits(policy), atol=0.05)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("held", STORED)
@pytest.mark.parametrize("trained", [name for name, (_, alike) in TRAINED.items() if not alike])
def test_sides_that_differ_are_refused_or_written_apart(trained: str, held: str, tmp_path: Path) -> None:
    config, _ = TRAINED[trained]
    base, adapter = tied(tmp_path, config, False, held)
    with pytest.raises(MismatchError, match="--untie"):
        merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)
    assert not (tmp_path / "out").exists()
    out = merge_to_disk(base, tmp_path / "out", adapter=adapter, untie=True, progress=False)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert {EMBED, HEAD} <= stored(out).keys()
    policy = quiet(PeftModel.from_pretrained, load(base), adapter)
    assert torch.allclose(logits(load(out)), logits(policy), atol=0.05)


def test_untie_leaves_a_tie_alone_that_holds(tmp_path: Path) -> None:
    base, adapter = tied(tmp_path, *TRAINED["tokens"], "embedding")
    out = merge_to_disk(base, tmp_path / "out", adapter=adapter, untie=True, progress=False)
    assert HEAD not in stored(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_stochastic_rounding_rounds_both_sides_alike(tmp_path: Path) -> None:
    base, adapter = tied(tmp_path, *TRAINED["both alike"], "both")
    out = merge_to_disk(base, tmp_path / "out", adapter=adapter, rounding=Stochastic(3), progress=False)
    assert same_bits(stored(out)[EMBED], stored(out)[HEAD])


@pytest.mark.parametrize("trained", ["nothing of it", "embedding", "head", "both, not alike"])
def test_values_that_differ_on_disk_are_no_tie_whatever_the_config_says(trained: str, tmp_path: Path) -> None:
    """As transformers loads them."""
    config, alike = TRAINED[trained]
    base, _ = tied(tmp_path, config, alike, "both")
    rewrite(base, lambda tensors: tensors[HEAD].add_(1))
    model = adapt(load(base), **config)
    quiet(model.save_pretrained, tmp_path / "trained")
    out = merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "trained", progress=False)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    made = stored(out)
    assert all(same_bits(made[name], tensor) for name, tensor in MergedSource(model, untie=True))
    assert not same_bits(load(out).lm_head.weight, load(out).model.embed_tokens.weight)


def test_a_config_that_denies_the_tie_of_what_is_stored_is_refused(tmp_path: Path) -> None:
    base, adapter = tied(tmp_path, *TRAINED["nothing of it"], "embedding")
    rewrite(base, lambda _: None, tie_word_embeddings=False)
    with pytest.raises(MismatchError, match=r"lm_head\.weight: got nothing.*tie_word_embeddings"):
        merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)


def test_a_tensor_of_the_adapter_that_no_weight_is_made_of_is_refused(tmp_path: Path) -> None:
    base, adapter = tied(tmp_path, *TRAINED["tokens"], "both")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.lm_head.more": torch.ones(2)}, file)
    with pytest.raises(LorasyncError, match=r"lm_head\.more"):
        merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)


def test_a_model_in_memory_whose_config_denies_its_tie(tmp_path: Path) -> None:
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    policy = adapt(model, **VALUES)
    out = merge_to_disk(policy, tmp_path / "out", progress=False)
    assert torch.allclose(logits(load(out)), logits(policy), atol=0.05)


def test_other_tokens_on_the_two_sides_are_a_conflict_for_every_receiver() -> None:
    """Not only on the way to disk: a worker that merges would give both sides the embedding's."""
    spec = FactorSource(adapt(build("llama-tied"), **TRAINED["other tokens"][0])).spec()
    assert [rows.weight for rows in spec.rows] == [EMBED, HEAD]
    assert spec.conflicts
    shared = FactorSource(adapt(build("llama-tied"), **TRAINED["tokens"][0])).spec()
    assert ([rows.weight for rows in shared.rows], shared.conflicts) == ([EMBED], ())


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "q_proj"]], ids=["beside", "targeted"])
def test_embeddings_that_peft_saved_along_must_be_the_bases(targets: list[str], tmp_path: Path) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = adapt(base, target_modules=targets)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge_to_disk(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    with torch.no_grad():
        layer = base.get_input_embeddings()
        getattr(layer, "base_layer", layer).weight[3] += 1
    model.save_pretrained(tmp_path / "changed", save_embedding_layers=True)
    with pytest.raises(MismatchError, match=r"embed_tokens.*not the base's"):
        merge_to_disk(tmp_path / "base", tmp_path / "no", adapter=tmp_path / "changed", progress=False)
