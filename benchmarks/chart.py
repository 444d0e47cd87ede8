"""A table and a chart of what the benchmarks found: python -m benchmarks.chart FOLDER

FOLDER holds the figures that each wrote with --json, as benchmarks.run_all leaves them there. The table, in
markdown, is printed; the chart becomes FOLDER/chart.png. Figures that are not there are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

TIMES, SPEEDS = "time, gallama / the other: shorter is better", "times as fast: longer is better"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure, beside what it should be."""

    what: str
    value: float
    unit: str = ""
    target: float | None = None
    at_least: bool = False
    """Whether the target is the least that the value should be, or else the most."""
    panel: str | None = None
    """The part of the chart that shows it; None: only the table has it."""

    @property
    def is_met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def from_engine(figures: Any) -> Iterator[Finding]:
    for row in figures["work"]:
        work = f"{row['kind']}, {row['at_once']} at once"
        if (ratio := row.get("ratio_to_peer")) is not None:
            yield Finding(what=f"{work} / llama-server", value=ratio, target=row.get("target"), panel=TIMES)
        if (ratio := row.get("ratio_to_without")) is not None:
            yield Finding(what=f"{work} / without jump-forward", value=ratio, panel=TIMES)
    for row in figures["json_over_free"]:
        yield Finding(
            what=f"json over free text, {row['at_once']} at once",
            value=row["json_over_free"],
            target=row["target"],
            at_least=True,
            panel=SPEEDS,
        )


def from_speculative(figures: Any) -> Iterator[Finding]:
    for row in figures:
        for way in ("ngram", "draft"):
            yield Finding(
                what=f"{way} over plain: {row['task']}, {row['at_once']} at once",
                value=row[way]["times_as_fast"],
                target=row[way]["target"],
                at_least=True,
                panel=SPEEDS,
            )


def from_threads(figures: Any) -> Iterator[Finding]:
    for row in figures:
        what = f"shared cores over all for each, {row['workers']} busy"
        yield Finding(what=what, value=row["ratio"], at_least=True, panel=SPEEDS)


def from_gateway(figures: Any) -> Iterator[Finding]:
    first, token = figures["first_token_gateway_ms"], figures["token_gateway_us"]
    yield Finding(what="gateway's part of a first token", value=first, unit=" ms", target=1.0)
    yield Finding(what="gateway's processor time for a token", value=token / 1e3, unit=" ms", target=0.1)


def from_routing(figures: Any) -> Iterator[Finding]:
    what = f"prompt tokens computed, prefix_affinity / round_robin, {figures['conversations']} conversations"
    yield Finding(what=what, value=figures["ratio"], target=figures["target"])


def from_constraints(figures: Any) -> Iterator[Finding]:
    for row in figures["engines"]:
        what = f"a token under a schema, {row['engine']}"
        yield Finding(what=what, value=row["median_us"] / 1e3, unit=" ms")


def from_start_up(figures: Any) -> Iterator[Finding]:
    ready = next(row for row in figures if row["to"] == "ready")
    yield Finding(what="a worker is ready after", value=ready["with_cache_ms"] / 1e3, unit=" s", target=3.0)


def from_embedding(figures: Any) -> Iterator[Finding]:
    for row in figures:
        what = (
            f"vectors, requests of {row['sentences']}, {row['at_once']} at once, over infinity-emb in process"
        )
        yield Finding(what=what, value=row["ratio"], target=row["target"], at_least=True, panel=SPEEDS)


def from_memory(figures: Any) -> Iterator[Finding]:
    for row in figures:
        what = f"memory after many requests / after few ({row['measure'].upper()})"
        yield Finding(what=what, value=row["ratio"], target=row["target"])


def from_sampling(figures: Any) -> Iterator[Finding]:
    for name, row in figures.items():
        what = f"choosing a token with exllamav2, {name} / transformers' processors"
        yield Finding(what=what, value=row["ratio"], target=1.0, panel=TIMES)


READERS: Mapping[str, Callable[[Any], Iterator[Finding]]] = {
    "engine": from_engine,
    "speculative": from_speculative,
    "gateway": from_gateway,
    "routing": from_routing,
    "constraints": from_constraints,
    "start_up": from_start_up,
    "embedding": from_embedding,
    "threads": from_threads,
    "sampling": from_sampling,
    "memory": from_memory,
}


def read_findings(folder: Path) -> list[Finding]:
    return [
        finding
        for name, read in READERS.items()
        if (path := folder / f"{name}.json").exists()
        for finding in read(json.loads(path.read_text()))
    ]


def to_table(findings: Sequence[Finding]) -> str:
    """Markdown."""
    lines = ["| what | measured | target |", "| --- | --- | --- |"]
    for finding in findings:
        target = ""
        if finding.target is not None:
            bound = "≥" if finding.at_least else "≤"
            target = f"{bound} {finding.target:g}{finding.unit}{'' if finding.is_met else ', missed'}"
        lines.append(f"| {finding.what} | {finding.value:.3g}{finding.unit} | {target} |")
    return "\n".join(lines) + "\n"


def draw(findings: Sequence[Finding], path: Path) -> None:
    """A panel for each kind of ratio, with a bar for each finding, and a black mark at its target."""
    panels = {panel: [found for found in findings if found.panel == panel] for panel in (TIMES, SPEEDS)}
    panels = {panel: found for panel, found in panels.items() if found}
    if not panels:
        return
    heights = [len(found) + 2 for found in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), figsize=(9, 0.3 * sum(heights) + 0.5), height_ratios=heights, squeeze=False
    )
    for axis, (panel, found) in zip(axes[:, 0], panels.items(), strict=True):
        places = range(len(found))
        colours = ["#c44e52" if finding.is_met is False else "#4c72b0" for finding in found]
        bars = axis.barh(places, [finding.value for finding in found], color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        for place, finding in zip(places, found, strict=True):
            if finding.target is not None:
                axis.plot([finding.target] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
        axis.axvline(1, color="grey", linewidth=0.8, linestyle="--")
        axis.set_yticks(places, [finding.what for finding in found])
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_title(panel, fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_chart(folder: Path) -> str:
    """Draw the chart of a folder's figures; returns their table."""
    findings = read_findings(folder)
    draw(findings, folder / "chart.png")
    return to_table(findings)


def main() -> int:
    parser = argparse.ArgumentParser(description="A table and a chart of what the benchmarks found.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the figures are")
    options = parser.parse_args()
    print(write_chart(options.folder), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
