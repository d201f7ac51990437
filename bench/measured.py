"""What measurements have in common: words to whoever waits, numbers to four digits, the JSON at the end."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """To the person who waits."""
    print(text, file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """To four digits, inside too."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(content: Mapping[str, Any], file: str | Path | None) -> None:
    """Print the JSON of `content`, and write it to `file` where one was asked for."""
    text = json.dumps(content, indent=1)
    if file:
        Path(file).write_text(text + "\n", encoding="utf-8")
    print(text)
