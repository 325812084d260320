"""A 4-bit policy learns by reinforcement while a live vLLM engine follows it: the whole job, on a CPU.

The policy answers small sums and earns 1 for an answer that starts with the right number, else 0. A step is
GRPO: sample a group of answers to each question from vLLM, score them, update the trainer, push the weights.

    make quickstart        or, in an environment of your own:        python examples/quickstart.py MODEL
"""

import argparse
import os
import random
import re

for name, value in {  # one trainer process, no GPU, no model hub; to be set before torch and vLLM are imported
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
    "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(os.cpu_count()), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)

import deepspeed
import torch
from peft import get_peft_model
from rich.console import Console
from rich.live import Live
from rich.table import Table
from vllm import LLM, SamplingParams

import lorasync as ls
from lorasync.load import load_quantized
from lorasync.push import connect
from lorasync.verify import logprob_gap, model_digest

QUESTIONS, ANSWERS, TOKENS, LEARNING_RATE = 8, 8, 5, 5e-4


def main(model_path: str, steps: int, plot: str) -> None:
    torch.manual_seed(0)
    rng, console = random.Random(0), Console()

    # The trainer: an NF4 base, LoRA, DeepSpeed ZeRO-2. (A CPU computes fastest in fp32; on a GPU leave bf16 on.)
    preset = ls.QLORA_ZERO2
    ds_config = preset.deepspeed_config(bf16=None, optimizer={"params": {"lr": LEARNING_RATE}})
    model = load_quantized(model_path, ls.NF4, dtype=torch.float32, gradient_checkpointing=False)
    model = get_peft_model(model, preset.lora_config())
    ls.check_zero(model, ds_config)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # compiles for 90 s, and is of no use to one process
    )
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)

    # The rollout engine: started once. After the first push it serves the 4-bit policy, not the file it was loaded from.
    llm = LLM(model_path, dtype="float32", max_model_len=64, enforce_eager=True, seed=0,
              weight_transfer_config={"backend": "lorasync"})  # fmt: skip
    sync = connect(ls.MergedSource(engine), llm)
    sync.send_weights()

    exam = [
        f"Question: What is {a} + {b}?\nAnswer:" for a, b in ((2, 3), (4, 4), (6, 1), (7, 8), (9, 5), (3, 8))
    ]
    before = answers(llm, exam, sync.request())
    rewards, untouched = [], True
    table = Table(
        "step", "reward", "loss", "sync", "sent", "logprob gap", title="GRPO on an NF4 policy, live vLLM"
    )
    with Live(table, console=console, auto_refresh=False) as live:
        for step in range(steps):
            pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(QUESTIONS)]
            prompts = [f"Question: What is {a} + {b}?\nAnswer:" for a, b in pairs]
            sampling = SamplingParams(n=ANSWERS, temperature=1.0, max_tokens=TOKENS, seed=step)
            rollouts = llm.generate(prompts, sampling, use_tqdm=False, **sync.request())

            scores = torch.tensor([[reward(answer.text, a + b) for answer in rollout.outputs]
                                   for rollout, (a, b) in zip(rollouts, pairs, strict=True)])  # fmt: skip
            loss = grpo_loss(engine, rollouts, scores)
            engine.backward(loss)
            engine.step()

            trained = model_digest(model)
            report = sync.send_weights()
            untouched &= model_digest(model) == trained

            gap = logprob_gap(engine, llm, exam, max_tokens=TOKENS, request=sync.request())
            rewards.append(scores.mean().item())
            table.add_row(str(step + 1), f"{rewards[-1]:.2f}", f"{loss.item():+.3f}", f"{report.seconds['total']:.2f} s",
                          f"{report.bytes / 1e6:.0f} MB", f"{gap.mean:.1e}")  # fmt: skip
            live.update(table, refresh=True)

    comparison = Table("question", "before", "after", title="Greedy answers")
    for question, old, new in zip(exam, before, answers(llm, exam, sync.request()), strict=True):
        comparison.add_row(question.splitlines()[0].removeprefix("Question: What is "), old, new)
    console.print(comparison)
    third = max(len(rewards) // 3, 1)
    first, last = sum(rewards[:third]) / third, sum(rewards[-third:]) / third
    console.print(f"reward: {first:.2f} in the first third, {last:.2f} in the last")
    console.print(f"training model unchanged by sync: {'yes' if untouched else 'NO'}")
    draw(rewards, plot)
    console.print(f"reward curve: {plot}")
    sync.shutdown()


def reward(answer: str, right: int) -> float:
    number = re.match(r"\s*(\d+)", answer)
    return float(number is not None and int(number.group(1)) == right)


def grpo_loss(engine, rollouts, scores) -> torch.Tensor:
    """Group-relative advantages times log-probabilities; one update a batch, so no ratio to clip."""
    advantages = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)).flatten()
    pairs = [(list(r.prompt_token_ids), list(a.token_ids)) for r in rollouts for a in r.outputs]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + a) for p, a in pairs], batch_first=True)
    is_answer = torch.zeros(ids.shape)
    for row, (prompt, answer) in zip(is_answer, pairs, strict=True):
        row[len(prompt) : len(prompt) + len(answer)] = 1
    logits = engine(input_ids=ids, use_cache=False).logits[:, :-1]
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(advantages[:, None] * logprobs * is_answer[:, 1:]).sum() / is_answer.sum()


def answers(llm, questions, request) -> list[str]:
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    return [
        o.outputs[0].text.strip().partition("\n")[0]
        for o in llm.generate(questions, greedy, use_tqdm=False, **request)
    ]


def draw(rewards: list[float], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(rewards) + 1), rewards, marker="o")
    axes.set(
        xlabel="step", ylabel="mean reward", ylim=(0, 1), title="Sums answered rightly, NF4 SmolLM2-135M"
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--plot", default="quickstart.png")
    options = parser.parse_args()
    main(options.model, options.steps, options.plot)
