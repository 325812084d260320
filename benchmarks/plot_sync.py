"""Draws the tables that benchmarks/sync_gpu.py has written: docs/img/sync_h100.svg. Nothing is measured here.

python benchmarks/plot_sync.py benchmarks/results/sync*_qwen2-7b-r64-*_h100_202611.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "lorasync"  # the same file from the same numbers
import matplotlib.pyplot as plt
from sync_reports import read

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "img" / "sync_h100.svg"


def main() -> None:
    found = [read(Path(name)) for name in sys.argv[1:]]
    heights = [len(report.ways) for report in found]
    figure, axes = plt.subplots(
        len(found), 1, figsize=(9, 0.42 * sum(heights) + 1.1 * len(found)), height_ratios=heights,
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax, report in zip(axes[:, 0], found, strict=True):
        names = [way.name for way in report.ways]
        colors = ["tab:blue" if way.is_ours else "tab:gray" for way in report.ways]
        bars = ax.barh(names, [way.ms for way in report.ways], color=colors)
        ax.bar_label(bars, fmt="%.0f", padding=3)
        ax.axvline(
            report.floor, color="tab:red", linestyle="--", label=f"memory floor, {report.floor:.1f} ms"
        )
        ax.margins(x=0.08)
        ax.set_title(report.title, fontsize=10)
        ax.invert_yaxis()
        ax.legend(fontsize=8, loc="upper right")
    axes[-1, 0].set_xlabel("ms of a sync; blue: lorasync")
    figure.savefig(IMAGE, metadata={"Date": None})


if __name__ == "__main__":
    main()
