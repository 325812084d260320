"""Where does each way of syncing win, and what breaks first? On paper: `lorasync.planning.cost` from 8B to 1T parameters.

    python benchmarks/scaling.py            writes docs/img/scaling_*.svg and prints the tables of docs/scaling.md

Nothing is measured here. The device's constants were (see lorasync/planning/cost.py), the links are nominal.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # instead of this folder: its names could shadow others

from lorasync.planning.cost import ETHERNET10, H100, IB400, NVLINK, Cost, Job, Link, sync_seconds

IMAGES = ROOT / "docs" / "img"
LINKS = (NVLINK, IB400, ETHERNET10)
RANKS = (8, 16, 32, 64, 128, 256)
REPLICAS = (1, 10, 100, 1000)
WAYS = ("merged", "factors", "adapter")
SHARE = 40e9  # bytes of weights on one 80 GB device; the rest is KV cache


@dataclass(frozen=True)
class Shape:
    """A dense Llama: layers, width, MLP width, width of K and V, vocabulary."""

    name: str
    layers: int
    width: int
    mlp: int
    kv: int = 1024
    vocabulary: int = 128_256

    def job(self, rank: int, **changes: object) -> Job:
        """LoRA of one rank on all linear layers, bf16 throughout."""
        d, f, kv = self.width, self.mlp, self.kv
        matrices = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
        merged = self.layers * sum(i * o for i, o in matrices)
        factors = self.layers * rank * sum(i + o for i, o in matrices)
        return Job(
            merged, 2 * self.vocabulary * d, factors, rank, modules=self.layers * len(matrices), **changes
        )


SHAPES = (
    Shape("8B", 32, 4096, 14336),
    Shape("70B", 80, 8192, 28672),
    Shape("405B", 126, 16384, 53248),
    Shape("1T", 150, 24576, 73728),  # no such model: a dense one, to see where the lines go
)


def predict(shape: Shape, way: str, rank: int, link: Link, replicas: int, *, broadcast: bool = True) -> Cost:
    job = shape.job(rank)
    size = (job.merged + job.untouched) * job.served_bytes
    settings = {"trainer": H100, "worker": H100, "link": link, "devices": max(1, round(size / SHARE))}
    return sync_seconds(way, job, replicas=replicas, broadcast=broadcast, **settings)


def table() -> str:
    """Seconds of a sync, r=64: one engine after another / one broadcast."""
    lines = ["| model | link | way | GB a sync | 1 replica | 10 | 100 | 1,000 |", "| --- " * 8 + "|"]
    for shape in SHAPES:
        for link in LINKS:
            for way in WAYS[:2]:
                pairs = [
                    tuple(predict(shape, way, 64, link, n, broadcast=b).total for b in (False, True))
                    for n in REPLICAS
                ]
                size = predict(shape, way, 64, link, 1).wire_bytes / 1e9
                cells = [_short(pairs[0][0])] + [
                    f"{_short(each)} / {_short(once)}" for each, once in pairs[1:]
                ]
                lines.append(f"| {shape.name} | {link.name} | {way} | {_round(size)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def crossings() -> str:
    """From which rank on do factors cost more than merged weights, one replica?"""
    lines = [
        "| model | factors at r=8 | r=64 | r=256 | weights | rank at which factors weigh as much |",
        "| --- " * 6 + "|",
    ]
    for shape in SHAPES:
        sizes = [predict(shape, "factors", r, IB400, 1).wire_bytes / 1e9 for r in (8, 64, 256)]
        weights = predict(shape, "merged", 8, IB400, 1).wire_bytes / 1e9
        cells = " | ".join(f"{size:.2f} GB" for size in sizes)
        lines.append(f"| {shape.name} | {cells} | {weights:.0f} GB | {8 * weights / sizes[0]:,.0f} |")
    return "\n".join(lines)


def _round(size: float) -> str:
    return f"{size:.2f}" if size < 10 else f"{size:,.0f}"


def _short(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )


def draw() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "lorasync"  # the same file from the same numbers
    import matplotlib.pyplot as plt

    IMAGES.mkdir(parents=True, exist_ok=True)
    colours = dict(zip(WAYS, ("tab:red", "tab:blue", "tab:green"), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for ax, link in zip(axes, LINKS, strict=True):
        sizes = [s.job(64).merged + s.job(64).untouched for s in SHAPES]
        for way in WAYS:
            seconds = [predict(s, way, 64, link, 1).total for s in SHAPES]
            ax.loglog(sizes, seconds, marker="o", color=colours[way], label=way)
        ax.set(xlabel="parameters", title=f"one engine, r=64, {link.name}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds of a sync")
    axes[0].legend()
    figure.savefig(IMAGES / "scaling_size.svg", metadata={"Date": None})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    counts = [1, 3, 10, 30, 100, 300, 1000]
    for way in WAYS:
        for broadcast, style in ((False, "-"), (True, "--")):
            seconds = [predict(SHAPES[1], way, 64, IB400, n, broadcast=broadcast).total for n in counts]
            label = f"{way}, {'broadcast' if broadcast else 'one after another'}"
            axes[0].loglog(counts, seconds, style, color=colours[way], label=label)
        seconds = [predict(SHAPES[1], way, r, IB400, 100, broadcast=False).total for r in RANKS]
        axes[1].loglog(RANKS, seconds, marker="o", color=colours[way], label=way)
    axes[0].set(xlabel="replicas", ylabel="seconds of a sync", title="70B, r=64, 400 Gb/s")
    axes[1].set(xlabel="rank", title="70B, 100 replicas one after another, 400 Gb/s")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(IMAGES / "scaling_replicas.svg", metadata={"Date": None})


def main() -> None:
    draw()
    print(crossings() + "\n\n" + table())


if __name__ == "__main__":
    main()
