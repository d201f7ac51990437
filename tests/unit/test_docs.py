"""What README and docs tell a person to type is accepted, and what they point to is there."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from kdsr import config
from kdsr.checkpoint import bundled_names, load_card
from kdsr.cli import parse
from kdsr.objectives import TERMS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS: dict[str, type[BaseModel]] = {
    "shard": config.ShardConfig,
    "shard --check": config.CheckConfig,
    "train_teacher": config.TeacherTrainingConfig,
    "label": config.LabelConfig,
    "distill": config.DistillConfig,
    "compare": config.CompareConfig,
    "tune": config.TuneConfig,
    "evaluate": config.EvaluateConfig,
    "upscale": config.UpscaleConfig,
    "serve": config.ServeConfig,
    "demo": config.DemoConfig,
}


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, job, arguments) of every `python jobs/JOB.py ...` in the pages, continued lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ").replace("/home/ray/kdsr/", "")
        for job, rest in re.findall(r"python jobs/(\w+)\.py([^\n`|]*)", text):
            arguments = shlex.split(rest, comments=True)
            if arguments and "..." not in rest:
                found.append((page.name, f"{job} --check" if "--check" in arguments else job, arguments))
    return found


def test_the_pages_show_every_job_but_the_demo() -> None:
    assert {job for _, job, _ in commands()} >= CONFIGS.keys() - {"demo"}
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {job.split()[0] for job in CONFIGS}


@pytest.mark.parametrize(("page", "job", "arguments"), commands(), ids=lambda value: str(value)[:40])
def test_a_command_on_a_page_is_accepted(
    page: str, job: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if "--help" not in arguments:
        parse(CONFIGS[job], arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_on_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?!s)", "".join(_code(page)))) <= targets


def _code(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"```.*?```", text, re.DOTALL) + re.findall(r"`[^`\n]+`", text)


def test_the_page_of_architecture_names_every_module() -> None:
    named = set(re.findall(r"\w+", (ROOT / "docs/architecture.md").read_text(encoding="utf-8")))
    modules = {path.stem for folder in ("kdsr", "cluster") for path in (ROOT / folder).glob("[!_]*")}
    assert modules - {"py", "weights"} <= named


def test_the_page_of_results_is_what_the_files_say() -> None:
    bench = runpy.run_path(str(ROOT / "bench/render_results.py"))
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == bench["render"]()
    methods = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
    assert methods == bench["with_gains"](methods)
    assert [name for _, name, _ in bench["GAINS"].findall(methods)] == ["optimizers", "distillation", "terms"]


def test_the_table_of_models_in_the_readme_has_the_sizes_of_their_cards() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in bundled_names():
        row = next(line for line in readme.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert f"{round(load_card(name).num_parameters / 1000)} K" in row


def test_pieces_of_configs_on_the_page_of_distillation_are_accepted() -> None:
    text = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
    pieces = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    base = yaml.safe_load((ROOT / "jobs/configs/distill_x4.yaml").read_text(encoding="utf-8"))
    assert len(pieces) >= 3
    for piece in pieces:
        config.DistillConfig.model_validate({**base, **yaml.safe_load(piece)})


def test_the_page_of_distillation_tells_of_every_term() -> None:
    text = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
    kinds = {term.model_fields["kind"].default for term in TERMS}
    assert kinds == set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) - {"kind"}


def test_each_term_has_a_formula_a_use_a_cost_and_a_gain_that_is_in_the_table() -> None:
    text = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == {term.model_fields["kind"].default for term in TERMS}
    measured = set(re.findall(r"^\| (\w+) \|", text[text.index("## What helped") :], re.MULTILINE))
    for kind, section in sections.items():
        assert "```text\n" in section and "**Choose it**" in section and "**Cost**" in section, kind
        (gain,) = re.findall(r"\*\*Gain\*\*: (.*?)\n\n", section, re.DOTALL)
        rows = re.findall(r"`(\w+)`", gain)
        assert "not measured alone" in gain or (kind == "pixel" and "`alone`" in gain) or kind in rows, kind
        assert set(rows) <= measured, kind
