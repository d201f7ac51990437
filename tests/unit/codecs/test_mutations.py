import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def mutate(tmp_path, *options):
    """Exit status and result of bench/mutations.py."""
    result = tmp_path / "result.json"
    command = [sys.executable, "bench/mutations.py", "--json", str(result), "--no-upscale", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done, json.loads(result.read_text())


def test_broken_files_of_all_formats_end_as_pictures_or_typed_failures(tmp_path):
    done, result = mutate(tmp_path, "--count", "170")
    assert result["findings"] == []
    assert done.returncode == 0, done.stderr
    assert result["files"] == 170
    assert result["pictures"] + sum(result["failures_by_class"].values()) == 170
    assert set(result["failures_by_class"]) <= {"ImageCorrupt", "ImageUnsupported", "ImageTooLarge"}
    assert {"jpeg", "png", "webp", "tiff", "avif", "gif", "bmp", "ppm"} <= set(result["by_format"])
    assert result["by_mutation"]["keep"] == {"picture": result["by_mutation"]["keep"]["picture"]}


def test_the_harness_sees_what_it_is_there_for(tmp_path):
    """A worker with no time hangs, unless it is very quick, and that makes the exit status 1."""
    done, result = mutate(tmp_path, "--count", "6", "--seconds", "0")
    assert result["hangs"] >= 1
    assert done.returncode == 1
