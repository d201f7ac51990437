"""Make one file of what jobs/compare.py found at several scales, for docs/results/distillation.json.

    python bench/join_comparisons.py out/compare-x4/results.json out/compare-x2/results.json --json FILE

Rows and sums stand one after the other, each with its scale. `budget` has that of each comparison, by scale;
title and remarks are those of an earlier FILE.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One content of the kind that jobs/compare.py writes. Raises ValueError for two of one scale."""
    scales = [_scale(each) for each in results]
    if len(set(scales)) < len(scales):
        raise ValueError(f"each comparison has to be of another scale; found {scales}")
    named = dict(zip(scales, results, strict=True))
    return {
        "budget": {scale: each["budget"] for scale, each in named.items()},
        **{part: [row for each in results for row in each[part]] for part in ("summary", "rows", "missing")},
        "failed": {name: cause for each in results for name, cause in each["failed"].items()},
        "machine": "; ".join(dict.fromkeys(each["machine"] for each in results)),
        "command": "\n".join(each["command"] for each in results),
        "commit": ", ".join(dict.fromkeys(each["commit"] for each in results)),
        "date": max(each["date"] for each in results),
    }


def _scale(result: dict[str, Any]) -> str:
    scales = {row["scale"] for row in result["rows"]}
    if len(scales) != 1:
        raise ValueError(f"a comparison is of one scale; found {sorted(scales) or 'no rows'}")
    return f"x{scales.pop()}"


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.json of each comparison")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE")
    arguments = parser.parse_args()
    before = json.loads(arguments.json.read_text("utf-8")) if arguments.json.exists() else {}
    kept = {name: before[name] for name in ("title", "remarks") if name in before}
    try:
        content = joined([json.loads(path.read_text("utf-8")) for path in arguments.results])
    except ValueError as error:
        sys.exit(f"error: {error}")
    arguments.json.write_text(json.dumps(kept | content, indent=1) + "\n", "utf-8")
    print(f"{len(content['rows'])} rows of {len(arguments.results)} comparisons: {arguments.json}")


if __name__ == "__main__":
    _main()
