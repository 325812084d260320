"""The command line, as a person types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasync import cli
from lorasync.errors import LoadError, MismatchError
from tests import models
from tests.packed_bases import fp8_folder


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        return self.stdout + self.stderr


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, "-m", "lorasync.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **env}
    )


@pytest.fixture
def lorasync(monkeypatch, capsys):
    """The same in this process, which is faster."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lorasync", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return Done(int(left.value.code or 0), said.out, said.err)

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return models.save(models.tiny_llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    models.with_adapter(models.tiny_llama()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def ds_config(tmp_path) -> Path:
    return written(tmp_path / "ds.json", {"stage": 2})


def written(path: Path, zero: dict[str, Any]) -> Path:
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    path.write_text(json.dumps(settings))
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_doctor_lists_the_libraries_and_never_raises():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
    assert "vLLM plugin: found" in done.stdout


def test_doctor_survives_broken_metadata_and_a_terminal_without_unicode(lorasync, monkeypatch):
    def broken(*_: object, **__: object) -> Any:
        raise ValueError("bad metadata")

    monkeypatch.setattr(cli, "version", broken)
    monkeypatch.setattr(cli, "entry_points", broken)
    done = lorasync("doctor")
    assert done.returncode == 0
    assert "unreadable (ValueError)" in done.stdout
    monkeypatch.setattr(cli, "version", lambda _: None)
    assert lorasync("doctor").returncode == 0
    assert run("doctor", PYTHONIOENCODING="ascii", LC_ALL="C").returncode == 0


def test_what_stands_in_brackets_is_printed(lorasync, monkeypatch):
    monkeypatch.setattr(cli, "entry_points", lambda **_: [])
    said = lorasync("doctor").stdout
    assert "pip install 'lorasync[vllm]'" in said
    assert "pip install 'lorasync[qlora]'" in said


@pytest.mark.parametrize("error", [LoadError, ImportError, RuntimeError])
def test_brackets_in_an_error_are_printed_too(error, lorasync, monkeypatch, base, adapter, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise error("got none. pip install 'lorasync[qlora]' [/] [bold] :smile: {x}")

    monkeypatch.setattr("lorasync.export.merge_to_disk", fail)
    done = lorasync("merge", base, adapter, tmp_path / "out")
    assert done.returncode == 2
    assert (
        f"{error.__name__}: got none. pip install 'lorasync[qlora]' [/] [bold] :smile: {{x}}" in done.stderr
    )


def test_brackets_in_findings_are_printed(lorasync, monkeypatch, base, ds_config):
    from lorasync.zero import report

    found = report.Finding(
        "a-code", "warning", "a[key]", "[1, 2]", "because [x]", "pip install 'lorasync[zero]'"
    )
    judged = report.ZeroReport("plan", "here", (found,))
    monkeypatch.setattr("lorasync.zero.inspect_path", lambda *_, **__: judged)
    done = lorasync("check-zero", base, ds_config)
    assert done.returncode == 3
    assert "warning a-code: a[key] = [1, 2]" in done.stdout
    assert "because [x]" in done.stdout
    assert "'lorasync[zero]'" in done.stdout


@pytest.mark.parametrize(
    ("zero", "code", "said"),
    [({"stage": 2}, 0, ""), ({"stage": 3, "zero_quantized_weights": True}, 1, "zero_quantized_weights")],
)
def test_check_zero_speaks_through_its_exit_code(base, tmp_path, zero, code, said, lorasync):
    done = lorasync("check-zero", base, written(tmp_path / "ds.json", zero))
    assert done.returncode == code, done.said
    assert said in done.stdout


def test_check_zero_judges_the_quantization_that_is_meant_and_says_which(lorasync, base, tmp_path):
    config = written(tmp_path / "ds.json", {"stage": 3, "stage3_use_all_reduce_for_fetch_params": True})
    plain, packed = (
        lorasync("check-zero", base, config),
        lorasync("check-zero", base, config, "--preset", "NF4"),
    )
    assert "the base not quantized (QLoRA: say --preset nf4)" in plain.stdout
    assert plain.returncode == 0, plain.said
    assert "the base quantized as nf4" in packed.stdout
    assert packed.returncode != 0, packed.said
    assert "the base not quantized;" in lorasync("check-zero", base, config, "--preset", "none").stdout
    for done in (plain, packed):
        assert "a LoRA on all linear layers" in done.stdout
        assert re.search(r"Judged for: deepspeed \S+, transformers \d", done.stdout)


def test_check_zero_judges_the_adapter_that_is_named(lorasync, base, adapter, ds_config, tmp_path):
    done = lorasync("check-zero", base, ds_config, "--adapter", adapter)
    assert "the adapter's LORA, r=8 on " in done.stdout
    assert "q_proj" in done.stdout
    own = json.loads((Path(adapter) / "adapter_config.json").read_text())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "adapter_config.json").write_text(json.dumps({**own, "base_model_name_or_path": base, "r": 16}))
    shutil.copytree(mine, tmp_path / "above" / "policy")
    for place in (mine, mine.parent / "above"):
        assert "the adapter's LORA, r=16" in lorasync("check-zero", place, ds_config).stdout


def test_check_zero_says_what_the_config_says_of_a_packed_base(lorasync, ds_config, tmp_path):
    fp8 = fp8_folder(tmp_path / "fp8", "qwen3")
    assert "as its config says, packed by fp8" in lorasync("check-zero", fp8, ds_config).said


def test_merge_writes_what_peft_merges(base, tmp_path):
    policy = models.with_adapter(models.tiny_llama())
    policy.save_pretrained(tmp_path / "adapter")
    done = run("merge", base, str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    merged = tensors(tmp_path / "out")
    expected = policy.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[n], t) for n, t in expected.items())
    assert "B/s" in done.stderr  # the bar


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_merge_to_a_dtype(name, lorasync, base, adapter, tmp_path):
    done = lorasync("merge", base, adapter, tmp_path / "out", "--dtype", name)
    assert done.returncode == 0, done.said
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merge_unties_and_overwrites_where_it_is_told_to(lorasync, tmp_path):
    base = models.save(models.tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    policy = models.with_adapter(models.tiny_llama(tie_word_embeddings=True), target_modules=["embed_tokens"])
    policy.save_pretrained(tmp_path / "adapter")
    said = lorasync("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert (said.returncode, "--untie" in said.stderr) == (2, True)
    assert lorasync("merge", base, tmp_path / "adapter", tmp_path / "out", "--untie").returncode == 0
    assert "lm_head.weight" in tensors(tmp_path / "out")
    again = lorasync("merge", base, tmp_path / "adapter", tmp_path / "out", "--untie")
    assert (again.returncode, "--overwrite" in again.stderr) == (2, True)
    assert (
        lorasync("merge", base, tmp_path / "adapter", tmp_path / "out", "--untie", "--overwrite").returncode
        == 0
    )


def test_plan_says_what_travels_and_what_survives(base, adapter, tmp_path, lorasync):
    plot = tmp_path / "survival.png"
    done = lorasync("plan", base, adapter, "--plot", plot, "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert "→ MergeInWorker" in done.stdout
    assert "layers.1.self_attn.k_proj.weight" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run("plan", base, adapter, PYTHONIOENCODING="ascii").returncode == 0


@pytest.fixture
def places(base, adapter, ds_config, tmp_path) -> dict[str, str]:
    """Folders and files that are not what they should be."""
    found = {"base": base, "adapter": adapter, "ds": str(ds_config), "out": str(tmp_path / "out")}
    for name in (
        "empty",
        "no-weights",
        "bin",
        "bin-adapter",
        "gguf",
        "bad-json",
        "bad-adapter",
        "torn",
        "wrong-method",
    ):
        (tmp_path / name).mkdir()
        found[name] = str(tmp_path / name)
    config, settings = (
        (Path(base) / "config.json").read_text(),
        (Path(adapter) / "adapter_config.json").read_text(),
    )
    for name in ("no-weights", "bin", "gguf", "torn"):
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "torn" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "bin-adapter" / "adapter_config.json").write_text(settings)
    (tmp_path / "bin-adapter" / "adapter_model.bin").write_bytes(b"pickle")
    (tmp_path / "bad-json" / "config.json").write_text("{")
    (tmp_path / "bad-adapter" / "adapter_config.json").write_text("[]")
    (tmp_path / "wrong-method" / "adapter_config.json").write_text('{"peft_type": "LOAR"}')
    (tmp_path / "bad.json").write_text("{not json")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "unknown").mkdir()
    novel = {**json.loads(config), "model_type": "novel", "architectures": ["NovelForCausalLM"]}
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(novel))
    shutil.copy(Path(base) / "model.safetensors", tmp_path / "unknown")
    shutil.copytree(adapter, tmp_path / "torn-adapter")
    (tmp_path / "torn-adapter" / "adapter_model.safetensors").write_text("version https://git-lfs")
    models.with_adapter(models.tiny_llama(num_hidden_layers=3)).save_pretrained(tmp_path / "deeper")
    other = models.with_adapter(models.tiny_llama(intermediate_size=64))
    other.save_pretrained(tmp_path / "other")
    several = tmp_path / "several"
    for name in ("one", "two"):
        models.with_adapter(models.tiny_llama(), adapter_name=name).save_pretrained(several)
    (tmp_path / "file").write_text("x")
    found |= {name: str(tmp_path / name) for name in ("binary", "unknown", "torn-adapter", "deeper")}
    rest = {
        "list-ds": "list.json",
        "bad-ds": "bad.json",
        "other": "other",
        "several": "several",
        "file": "file",
        "nowhere": "nowhere",
    }
    return {**found, **{name: str(tmp_path / path) for name, path in rest.items()}}


# What is typed ({…} is a place), and what the answer names.
WRONG = [
    ("plan {base} nope", "nope"),
    ("plan {base} {nowhere}", "nowhere"),
    ("plan {nowhere} {adapter}", "nowhere"),
    ("plan {empty} {adapter}", r"config\.json"),
    ("plan {no-weights} {adapter}", r"model\.safetensors"),
    ("plan {file} {adapter}", "got a file"),
    ("plan {bad-json} {adapter}", "no JSON"),
    ("plan {base} {bad-adapter}", "expected a JSON object"),
    ("plan {base} {wrong-method}", r"adapter_config\.json.*LOAR"),
    ("plan {base} {other}", "gate_proj"),
    ("plan {base} {adapter} --dtype bfloat", r"'bfloat'.*Did you mean bfloat16\?"),
    ("plan {base} {adapter} --dtype load", "'load'"),
    ("plan {base} {adapter} --dtype int8", "'int8'"),
    ("plan {base} {adapter} --plot {empty}/x.xyz", r"\.png"),
    ("plan {base} {adapter} --plot {nowhere}/x.png", "nowhere"),
    ("plan {base}", "(?i)missing argument.*adapter"),
    ("merge {base} nope {out}", "nope"),
    ("merge {nowhere} {adapter} {out}", "nowhere"),
    ("merge no/such-model {adapter} {out}", "hf download no/such-model"),
    ("merge {base} no/such-adapter {out}", "hf download no/such-adapter"),
    ("merge {adapter} {base} {out}", "The base comes first"),
    ("merge {base} {base} {out}", "The base comes first"),
    ("merge {file} {adapter} {out}", "got a file"),
    ("merge {base} {file} {out}", "got a file"),
    ("merge {empty} {adapter} {out}", r"config\.json"),
    ("merge {base} {empty} {out}", r"adapter_config\.json"),
    ("merge {no-weights} {adapter} {out}", r"model\.safetensors"),
    ("merge {bin} {adapter} {out}", r"pytorch_model\.bin is a pickle.*save_pretrained"),
    ("merge {base} {bin-adapter} {out}", r"adapter_model\.bin is a pickle.*weights_only=True"),
    ("merge {gguf} {adapter} {out}", r"model\.gguf is GGUF"),
    ("merge {torn} {adapter} {out}", "Git LFS"),
    ("merge {bad-json} {adapter} {out}", "no JSON"),
    ("merge {base} {bad-adapter} {out}", "expected a JSON object"),
    ("merge {base} {wrong-method} {out}", "LOAR"),
    ("merge {base} {other} {out}", "gate_proj"),
    ("merge {base} {several} {out}", "one, two"),
    ("merge {base} {adapter} {file}", "something there already"),
    ("merge {base} {adapter} {file}/out", "can't be written"),
    ("merge {base} {adapter} /proc/nowhere/out", "can't be written"),
    ("merge {base} {adapter} {base} --overwrite", "expected another place"),
    ("merge {base} {adapter} {out} --dtype fp8", "'fp8'"),
    ("merge {base} {adapter} {out} --untied", "--untie"),
    ("check-zero {nowhere} {ds}", "nowhere"),
    ("check-zero {base} {nowhere}", "nowhere"),
    ("check-zero {base} {bad-ds}", r"bad\.json"),
    ("check-zero {base} {empty}", "empty"),
    ("check-zero {base} {ds} --preset nf5", r"'nf5'.*Did you mean nf4\?"),
    ("check-zero {base} {ds} --preset qlora", "'qlora'"),
    ("check-zero {base} {ds} --adapter {nowhere}", "nowhere"),
    ("check-zero {base} {ds} --adapter {bad-adapter}", "expected a JSON object"),
    ("check-zero {bad-json} {ds}", r"config\.json"),
    ("check-zero {bad-adapter} {ds}", r"adapter_config\.json"),
    ("check-zero {wrong-method} {ds}", "LOAR"),
    ("check-zero {several} {ds}", "one, two"),
    ("check-zero {base} {list-ds}", r"list\.json"),
    ("check-zero {base} {binary}", "binary"),
    ("check-zero {unknown} {ds}", "unknown"),
    ("check-zero {file} {ds}", "file"),
    ("plan {unknown} {adapter}", "novel"),
    ("merge {unknown} {adapter} {out}", "novel"),
    ("plan {base} {deeper}", r"layers\.2"),
    ("merge {base} {deeper} {out}", r"layers\.2"),
    ("plan {base} {torn-adapter}", "Git LFS"),
    ("merge {base} {torn-adapter} {out}", "Git LFS"),
    ("plan {torn} {adapter}", "torn"),
    ("merge {base} {adapter} {adapter}/.. --overwrite", "expected another place"),
    ("chek-zero {base} {ds}", "chek-zero"),
]


@pytest.mark.parametrize(("typed", "named"), WRONG, ids=[typed for typed, _ in WRONG])
def test_bad_input_is_one_message_and_exit_code_2(typed, named, lorasync, places, tmp_path):
    arguments = [word.format(**places) for word in typed.split()]
    before = sorted(tmp_path.rglob("*"))
    done = lorasync(*arguments)
    assert done.returncode == 2, done.said
    assert "Traceback" not in done.said
    assert re.search(named, " ".join(done.stderr.split())), done.stderr
    assert sum(line.strip() != "" for line in done.stderr.splitlines()) < 40
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_in_a_subfolder_of_its_name_is_found(lorasync, base, tmp_path):
    policy = models.with_adapter(models.tiny_llama(), adapter_name="policy")
    policy.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    done = lorasync("merge", base, tmp_path / "run", tmp_path / "out")
    assert done.returncode == 0, done.said
    expected = policy.merge_and_unload().state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in tensors(tmp_path / "out").items())
    assert lorasync("plan", base, tmp_path / "run").returncode == 0


def test_hub_ids_are_found_in_the_cache_and_nothing_is_downloaded(base, adapter, tmp_path):
    cache = tmp_path / "cache"
    for name, folder in (("models--me--tiny", base), ("models--me--lora", adapter)):
        snapshot = cache / name / "snapshots" / ("0" * 40)
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(folder)
        (cache / name / "refs").mkdir()
        (cache / name / "refs" / "main").write_text("0" * 40)
    done = run("merge", "me/tiny", "me/lora", str(tmp_path / "out"), HF_HUB_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert tensors(tmp_path / "out").keys() == tensors(Path(base)).keys()
    done = run(
        "check-zero", "me/tiny", str(written(tmp_path / "ds.json", {"stage": 2})), HF_HUB_CACHE=str(cache)
    )
    assert done.returncode == 0, done.stderr


def test_a_vocabulary_that_was_extended_before_training_names_the_way_out(lorasync, base, tmp_path):
    model = models.tiny_llama()
    model.resize_token_embeddings(520)
    models.with_adapter(model, target_modules=["q_proj"]).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    done = lorasync("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == 2
    assert "model.resize_token_embeddings(520)" in done.stderr, done.stderr


def _merging(base: str, adapter: str, out: Path) -> subprocess.Popen[str]:
    """A merge that has begun to write, and is slow."""
    script = (
        "import signal, sys, time; from lorasync import cli; from lorasync.export import writer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "real = writer._write\n"
        "def slow(sink, tensor):\n    real(sink, tensor); time.sleep(0.5)\n"
        "writer._write = slow; sys.argv = ['lorasync', *sys.argv[1:]]; cli.main()\n"
    )
    command = [sys.executable, "-c", script, "merge", base, adapter, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(out.parent.glob(".out.partial-*/*")) and time.monotonic() < until:
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_an_interrupted_merge_leaves_nothing(signal_, base, adapter, tmp_path):
    process = _merging(base, adapter, tmp_path / "out")
    process.send_signal(signal_)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "removed" in said
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_nobody_foresaw_is_one_line_and_shows_more_when_asked(
    base, adapter, tmp_path, lorasync, monkeypatch
):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("lorasync.export.merge_to_disk", fail)
    done = lorasync("merge", base, adapter, tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "ZeroDivisionError: by zero (LORASYNC_DEBUG=1" in done.stderr
    monkeypatch.setenv("LORASYNC_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["lorasync", "merge", base, adapter, str(tmp_path / "out")])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_many_mismatches_are_a_list(lorasync, monkeypatch, base, adapter, tmp_path):
    from lorasync.errors import Mismatch

    def fail(*_: object, **__: object) -> None:
        raise MismatchError("Wrong:", [Mismatch(f"w[{i}]", "1", "2", "Do [x].") for i in range(2)])

    monkeypatch.setattr("lorasync.export.merge_to_disk", fail)
    said = lorasync("merge", base, adapter, tmp_path / "out").stderr.splitlines()
    assert said == ["MismatchError: Wrong:", *(f"  w[{i}]: got 1, expected 2. Do [x]." for i in range(2))]
