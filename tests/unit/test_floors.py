"""The house stands: who may import whom, and what starts without the heavy libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = [
    "errors spec uris terms space config cli provenance",
    "background image codecs tiles store lease shards lanes photos naming turns manifest progress tracking "
    "measures duplicates check client",
    "models engine engine_cuda degrade pairs losses objectives metrics checkpoint benchmark memory "
    "optimizers",
    "fit training validation observe label upscale resize windows encoded objects forecast evaluate report "
    "plots serving "
    "upscale_report check_report compare compare_summary compare_report tune tune_report",
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
HEAVY = {"torch", "ray", "pyarrow", "boto3", "PIL"}
SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("kdsr", "cluster") for path in (ROOT / folder).rglob("*.py")
)
JOBS = sorted(path.relative_to(ROOT) for path in (ROOT / "jobs").glob("*.py"))


def imports(source: Path) -> Iterator[str]:
    """Dotted names of everything that `source` imports, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(source: Path) -> str:
    """The part of the house: `store` for kdsr/store.py, `models` for kdsr/models/edsr.py."""
    return source.parts[1].removesuffix(".py")


def floor(source: Path) -> int:
    """Number of the floor that `source` lives on; `cluster` lives above the house."""
    if source.parts[0] == "cluster":
        return len(FLOORS)
    if source.parts[1] == "__init__.py":
        return 0
    assert module_of(source) in FLOOR_OF, f"{source}: new in the house; give it a floor in FLOORS"
    return FLOOR_OF[module_of(source)]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_module_imports_its_own_floor_or_a_lower_one(source):
    for name in imports(source):
        package, _, rest = name.partition(".")
        module = rest.partition(".")[0]
        if package == "kdsr" and module in FLOOR_OF:
            assert FLOOR_OF[module] <= floor(source), (
                f"{source} is on floor {floor(source)} and imports {name}"
            )
        assert source.parts[0] == "cluster" or package not in {"cluster", "jobs"}, f"{source} imports {name}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("ray", {"cluster"}),
        ("boto3", {"kdsr/store.py"}),
        ("botocore", {"kdsr/store.py"}),
        ("PIL", {"kdsr/codecs", "kdsr/report.py", "kdsr/check_report.py", "kdsr/client"}),
        ("matplotlib", {"kdsr/plots.py"}),
        ("spandrel", {"kdsr/checkpoint.py", "kdsr/models"}),
        ("httpx2", {"kdsr/client"}),
        ("fastapi", {"kdsr/serving", "cluster/serve.py"}),
        ("starlette", {"kdsr/serving", "cluster/serve.py"}),
        ("torch", {"kdsr", "cluster"}),
    ],
)
def test_a_library_is_imported_only_at_home(library, homes):
    for source in SOURCES:
        if any(name.split(".")[0] == library for name in imports(source)):
            assert any(source.is_relative_to(home) for home in homes), f"{source} imports {library}"


def test_every_name_on_a_floor_is_a_module():
    assert FLOOR_OF.keys() == {module_of(each) for each in SOURCES if each.parts[0] == "kdsr"} - {"__init__"}


def test_floors_zero_and_one_know_no_torch():
    for source in SOURCES:
        if floor(source) < 2:
            assert "torch" not in {name.split(".")[0] for name in imports(source)}, source


def test_the_cluster_knows_no_pixels():
    for source in SOURCES:
        if source.parts[0] == "cluster":
            assert not {"PIL", "kdsr.codecs.decode", "kdsr.codecs.encode"} & set(imports(source)), source


def loaded_after(code: str, *argv: str) -> set[str]:
    """Heavy libraries in memory after `code` ran in a fresh interpreter."""
    report = f"import sys; sys.stderr.write('|'.join({HEAVY!r} & set(sys.modules)))"
    program = f"import atexit; atexit.register(lambda: exec({report!r}))\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(filter(None, done.stderr.split("|")))


def test_a_config_loads_nothing_heavy():
    assert loaded_after("import kdsr.config, kdsr.cli, kdsr.spec") == set()


def test_the_client_loads_neither_torch_nor_ray():
    assert loaded_after("import kdsr.client") == {"PIL"}


@pytest.mark.parametrize("module", ["cluster.serve", "cluster.serve_jobs"])
def test_the_server_loads_torch_in_its_replicas_only(module):
    assert "torch" not in loaded_after(f"import {module}")


def test_who_counts_deaths_loads_nothing_heavy():
    assert loaded_after("import cluster.deaths") == set()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_job_answers_help_without_loading_anything_heavy(job):
    code = f"import runpy, sys; sys.argv[0] = {str(job)!r}; runpy.run_path({str(job)!r}, run_name='__main__')"
    assert loaded_after(code, "--help") == set()


def test_files_of_tests_have_names_of_their_own() -> None:
    # pytest imports them by name alone, and refuses the whole run for two of one name.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
