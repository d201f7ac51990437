import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import mutations

ROOT = Path(__file__).parents[3]


def mutate(tmp_path, *options):
    """Exit status and result of bench/mutations.py."""
    result = tmp_path / "result.json"
    command = [sys.executable, "bench/mutations.py", "--json", str(result), "--no-upscale", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    return done, json.loads(result.read_text())


def test_broken_files_of_all_formats_end_as_pictures_or_typed_failures(tmp_path):
    done, result = mutate(tmp_path, "--count", "170", "--seconds", "120")
    assert result["findings"] == []
    assert done.returncode == 0, done.stderr
    assert result["files"] == 170
    assert result["pictures"] + sum(result["failures_by_class"].values()) == 170
    assert set(result["failures_by_class"]) <= {"ImageCorrupt", "ImageUnsupported", "ImageTooLarge"}
    assert {"jpeg", "png", "webp", "tiff", "avif", "gif", "bmp", "ppm"} <= set(result["by_format"])
    assert result["by_mutation"]["keep"] == {"picture": result["by_mutation"]["keep"]["picture"]}


@pytest.mark.parametrize(
    ("program", "seconds", "found"), [("exec sleep 600", "0.1", "hangs"), ("exit 3", "60", "crashes")]
)
def test_a_worker_that_hangs_or_crashes_is_a_finding(monkeypatch, capsys, program, seconds, found):
    def started(_):
        return subprocess.Popen(["sh", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(mutations.Worker, "_started", started)
    monkeypatch.setattr(sys, "argv", ["mutations.py", "--count", "2", "--workers", "1", "--seconds", seconds])
    assert mutations.main() == 1
    result = json.loads(capsys.readouterr().out)
    assert result[found] == len(result["findings"]) == 2
