"""Where a number or a file comes from: command, commit, machine, date."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from kdsr import __version__


def command() -> str:
    """The command line of this process, the program's folder left out."""
    program = Path(sys.argv[0])
    name = (
        f"{program.parent.name}/{program.name}" if program.parent.name in {"jobs", "bench"} else program.name
    )
    return "python " + shlex.join([name, *sys.argv[1:]])


def commit() -> str:
    """The git commit of the source, with `+` when files differ from it; the version outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return __version__
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if changed else ''}" if head else __version__


def machine() -> str:
    """Processor and number of cores this process may use."""
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def stamp() -> dict[str, str]:
    """All of it, for the JSON of a measurement."""
    return {"machine": machine(), "command": command(), "commit": commit(), "date": now()}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
