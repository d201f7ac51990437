"""Write docs/results.md from the JSON files in docs/results/, so that no number in it is typed.

    python bench/render_results.py

A file is what jobs/evaluate.py or a script in bench/ wrote. The page has one section for each, in the order
of their names. docs/distillation.md gets its tables of gains from the same files.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
METHODS_PAGE = ROOT / "docs" / "distillation.md"
GAINS = re.compile(
    r"(<!-- gains in (\w+)\.json, by bench/render_results\.py -->\n).*?(<!-- until here -->)", re.DOTALL
)
"""The marks between which METHODS_PAGE has the gains of a file."""

INTRODUCTION = """# Results

Written by `python bench/render_results.py` from the files in [results/](results). Each section names the
command, the commit, the machine and the date of its numbers. Speed is comparable within one section only.

`psnr_y` in dB and `ssim_y` on luma, 8-bit outputs, `scale` pixels cut off each side: see
[formats](formats.md). `gmacs_720p` are 10^9 multiply-adds of the convolutions for a 1280 x 720 output;
`megapixels_per_second` are of output.
"""


def render() -> str:
    """The whole page."""
    sections = [section(path) for path in sorted(FOLDER.glob("*.json"))]
    return "\n".join([INTRODUCTION, *sections])


def section(path: Path) -> str:
    """Title, table, and where the numbers come from."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content = _mutations(content) if "by_format" in content else content
    rows = [{name: cell(name, value) for name, value in row.items()} for row in rows_of(content)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if any(row.get(name) for row in rows)]
    lines = [f"## {content.get('title', path.stem)}", "", *content.get("remarks", [])]
    lines += [""] * bool(content.get("remarks"))
    lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(row.get(name, '') for name in columns)} |" for row in rows]
    return "\n".join([*lines, "", *pictures(path), source(path, content), ""])


def rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table; bench/bulk.py has named cases instead, jobs/compare.py sums its rows up."""
    if "summary" in content:
        return _compared(content["summary"])
    if "cases" not in content:
        return list(content["rows"])
    sums = {name: content.get(name) for name in ("loop_mpx_s", "startup_seconds")}
    return [
        {"case": name, **_flat(case), **(sums if number == 0 else {})}
        for number, (name, case) in enumerate(content["cases"].items())
    ]


def _compared(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each student and method: the mean over the benchmarks, each of them, and the cost."""
    rows = []
    for mean in (row for row in summary if row["benchmark"] == "mean"):
        of = ("student", "method", "scale")
        same = [row for row in summary if all(row[name] == mean[name] for name in of)]
        each = {f"{row['benchmark']}_psnr_y": row["psnr_y"] for row in same if row is not mean}
        shown = ("scale", "student", "num_parameters", "method", "seeds")
        after = ("spread", "gain", "ssim_y", "steps_to_reference", "seconds_per_step", "peak_mb")
        rows.append({**{n: mean[n] for n in shown}, **each, **{n: mean[n] for n in after}})
    return rows


def with_gains(page: str) -> str:
    """`page` with the gains of today's files between its marks."""
    return GAINS.sub(lambda marks: f"{marks[1]}{_gains(marks[2])}\n{marks[3]}", page)


def _gains(name: str) -> str:
    """A row for each method, a column for each student with the gain in dB, then the cost of a step."""
    means = [row for row in _read(name)["summary"] if row["benchmark"] == "mean"]
    students = list(dict.fromkeys((row["scale"], row["student"]) for row in means))
    has_costs = any(row["cpu_seconds_per_step"] for row in means)
    columns = ["method", *(f"{student}, x{scale}" for scale, student in students)]
    columns += ["cost of a step"] * has_costs
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for method in dict.fromkeys(row["method"] for row in means):
        rows = {(row["scale"], row["student"]): row for row in means if row["method"] == method}
        cells = [cell("gain", rows[each]["gain"]) if each in rows else "" for each in students]
        cells += [_cost(method, means)] * has_costs
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(method: str, means: list[dict[str, Any]]) -> str:
    """CPU seconds of a step as a multiple of the reference's, from the least to the most over students."""
    alone = {(row["scale"], row["student"]): row for row in means if row["gain"] is None}
    found = [
        row["cpu_seconds_per_step"] / alone[row["scale"], row["student"]]["cpu_seconds_per_step"]
        for row in means
        if row["method"] == method and row["cpu_seconds_per_step"]
    ]
    least, most = (f"{each:.1f}" for each in (min(found, default=0.0), max(found, default=0.0)))
    return "" if not found else f"x {least}" if least == most else f"x {least} to {most}"


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def pictures(path: Path) -> list[str]:
    """Those in docs/images whose names begin with that of the file."""
    found = sorted((ROOT / "docs" / "images").glob(f"{path.stem}-*.png"))
    return [line for each in found for line in (f"![{each.stem}](images/{each.name})", "")]


def _mutations(content: dict[str, Any]) -> dict[str, Any]:
    """What bench/mutations.py wrote, with its counts as a table: a row for each format, and one for all."""
    untyped = ("untyped", "crashes", "hangs", "over_memory", "wrong_pictures")
    outcomes = ("picture", *content["failures_by_class"])
    counts = content["by_format"]
    rows = [
        {"format": name, "files": sum(count.values()), **{each: count.get(each, 0) for each in outcomes}}
        for name, count in counts.items()
    ]
    sums = {each: sum(row[each] for row in rows) for each in ("files", *outcomes)}
    found = ", ".join(f"{content[name]} {name}" for name in untyped)
    remark = (
        "Broken files through probe, decode, a bicubic x2 of small ones and encode, in a process with limits "
        "on time and memory. A `picture` has what its header promises, other columns are typed failures. "
        f"Of anything else there must be none: {found}. What is done to a file: bench/mutations.py."
    )
    title = "Hostile files"
    return content | {"title": title, "remarks": [remark], "rows": [*rows, {"format": "all", **sums}]}


def _flat(case: dict[str, Any]) -> dict[str, Any]:
    """What a reader compares, and the milliseconds of an image in each stage."""
    shown = ("input", "model", "precision", "images", "net_alone_mpx_s", "job_mpx_s", "ratio")
    stages = {f"{name}_ms": 1000 * seconds for name, seconds in case["where_time_goes"].items()}
    return {name: case[name] for name in shown} | stages


def source(path: Path, content: dict[str, Any]) -> str:
    """The line below a table."""
    machine = content["machine"]
    where = machine if isinstance(machine, str) else ", ".join(f"{v}" for v in machine.values())
    date = content["date"][:10]
    origin = f"[{path.name}](results/{path.name}), commit `{content['commit']}`, {date}, {where}:"
    return f"{origin}\n\n```\n{content['command']}\n```"


def cell(name: str, value: Any) -> str:
    """One value as text, with the digits that mean something."""
    if isinstance(value, dict):
        return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"
    if not isinstance(value, float):
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    digits = {"psnr_y": 2, "ssim_y": 4, "gmacs_720p": 1, "ratio": 2, "spread": 3, "seconds_per_step": 3}
    digits |= {name: 2} if name.endswith("_psnr_y") else {}
    few = name.endswith(("_ms", "_mb", "_mpx_s", "_second", "seconds"))
    return f"{value:,.{digits.get(name, 1 if few else 4)}f}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    METHODS_PAGE.write_text(with_gains(METHODS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and the gains in {METHODS_PAGE.relative_to(ROOT)}")
