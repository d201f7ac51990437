"""Everything that is written of a search: table, JSON, plots, and the best trial as a config of its own.

Works on whatever rows there are; what is missing is named. Trains nothing.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from kdsr import plots, provenance
from kdsr.config import Trial, TuneConfig
from kdsr.plots import Line, Points
from kdsr.report import Report, aligned
from kdsr.space import Domain
from kdsr.store import Store, open_store
from kdsr.tune import TrialRow, row_of

BEST_KEY = "best.yaml"
NAMED_LINES = 10
"""Trials that have a colour of their own."""
NOTE = (
    "PSNR-Y in dB: the best that the mean network of a trial reached on {num_images} held-out sub-images. "
    "They choose the checkpoint too, so it is a little too good. stopped: weaker than others after as many "
    "steps. One run each, with one seed: differences that matter want `jobs/compare.py`."
)


@dataclass(frozen=True)
class Search:
    """What is known of a search when it is written down."""

    config: TuneConfig

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """All that were asked for."""
        return self.config.trials()

    @cached_property
    def rows(self) -> dict[str, TrialRow]:
        """By the name of the trial; those that are there."""
        found = {trial.name: row_of(trial) for trial in self.trials}
        return {name: row for name, row in found.items() if row is not None}

    @cached_property
    def failed(self) -> dict[str, str]:
        """Name of a trial to the cause."""
        return {name: row.cause for name, row in self.rows.items() if row.status == "failed"}

    @cached_property
    def missing(self) -> list[str]:
        """Trials without a row."""
        return [trial.name for trial in self.trials if trial.name not in self.rows]

    @cached_property
    def measured(self) -> list[tuple[Trial, TrialRow, int, float]]:
        """Trials that did not fail, with the step of their best and that PSNR; the best first."""
        rows = [(trial, self.rows[trial.name]) for trial in self.trials if trial.name in self.rows]
        found = [(trial, row, *row.best) for trial, row in rows if row.status != "failed" and row.best]
        return sorted(found, key=lambda each: -each[3])


def write_search(config: TuneConfig) -> Report:
    """Write everything below `config.output`, trials.json last."""
    found, store = Search(config), open_store(config.output, config.store)
    table = markdown_table(found)
    note = NOTE.format(num_images=config.base_run().num_validation_images)
    store.put("table.md", f"{table}\n\n{note}\n".encode())
    for name, png in pictures(found).items():
        store.put(name, png)
    if found.measured:
        store.put(BEST_KEY, best_config(found).encode())
    store.put("trials.json", (json.dumps(results(found), indent=2, allow_nan=False) + "\n").encode())
    return Report(table, sentence(found, store))


def results(found: Search) -> dict[str, Any]:
    """What trials.json holds."""
    return {
        "space": {name: each.model_dump(exclude_defaults=True) for name, each in found.config.space.items()},
        "best": found.measured[0][0].name if found.measured else None,
        "trials": [_trial(found, trial) for trial in found.trials],
        **provenance.stamp(),
    }


def _trial(found: Search, trial: Trial) -> dict[str, Any]:
    row = found.rows.get(trial.name)
    best = row.best if row else None
    return {
        "name": trial.name,
        "values": trial.values,
        "status": row.status if row else "missing",
        "cause": row.cause if row else "",
        "best_step": best[0] if best else None,
        "heldout_psnr_y": best[1] if best else None,
        "heldout": row.heldout if row else [],
    }


# ---------------------------------------------------------------- text


def markdown_table(found: Search) -> str:
    """A line for each trial, the best first; a dash stands for what is missing."""
    fields = found.config.space
    best = [(trial, row.status, step, psnr) for trial, row, step, psnr in found.measured]
    lines = [
        [trial.name, *_shown(trial, fields), f"{psnr:.3f}", f"{step:,}", f"{_last(found, trial):,}", status]
        for trial, status, step, psnr in best
    ]
    done = {trial.name for trial, *_ in best}
    for trial in found.trials:
        if trial.name not in done:
            status = f"failed: {found.failed[trial.name]}" if trial.name in found.failed else "missing"
            lines.append([trial.name, *_shown(trial, fields), "-", "-", "-", status.replace("|", "\\|")])
    header = ["trial", *fields, "PSNR-Y", "at step", "steps", "status"]
    return aligned([header, *lines], left=(0, len(header) - 1))


def _shown(trial: Trial, fields: dict[str, Domain]) -> list[str]:
    return [_name(fields[name], value) for name, value in trial.values.items()]


def _name(domain: Domain, value: Any) -> str:
    """`value` in few characters; what has parts by its place among the choices."""
    if isinstance(value, dict | list):
        assert domain.choice is not None
        return f"choice {domain.choice.index(value)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _last(found: Search, trial: Trial) -> int:
    return found.rows[trial.name].heldout[-1][0]


def sentence(found: Search, store: Store) -> str:
    """The best trial, what it reached and its config; and what is missing."""
    left = [f"{len(found.missing)} missing"] if found.missing else []
    left += [f"{len(found.failed)} failed"] if found.failed else []
    rest = f"; {' and '.join(left)} of {len(found.trials)} trials" if left else ""
    if not found.measured:
        return f"no trial is measured yet{rest}"
    trial, _, step, psnr = found.measured[0]
    place = f"{store.uri}/{BEST_KEY}".removeprefix("file://")
    return f"best: {trial.name}, {psnr:.3f} dB held out at step {step:,}{rest}: {place}"


def best_config(found: Search) -> str:
    """The best trial as the YAML of a run of its own, which trains again from its beginning."""
    trial = found.measured[0][0]
    place = {"name": f"best-{trial.number:03}", "output": f"{found.config.output}/runs"}
    fields = trial.config.model_copy(update=place).model_dump(mode="json")
    return f"# config: {type(trial.config).__name__}\n{yaml.safe_dump(fields, sort_keys=False)}"


# ---------------------------------------------------------------- pictures


def pictures(found: Search) -> dict[str, bytes]:
    """PNGs by file name, when there is something to draw."""
    if not found.measured:
        return {}
    quantity = "held-out PSNR-Y (dB)"
    return {
        "curves.png": plots.curves({"": _lines(found)}, quantity=quantity),
        "fields.png": plots.scatter(_points(found), quantity=f"best {quantity}"),
    }


def _lines(found: Search) -> list[Line]:
    lines = []
    for rank, (trial, row, *_) in enumerate(found.measured):
        steps, values = np.array(row.heldout, dtype=np.float64).T
        lines.append(Line(trial.name if rank < NAMED_LINES else "others", steps, values[None]))
    return lines


def _points(found: Search) -> dict[str, Points]:
    return {
        name: Points(
            _places(domain, [trial.values[name] for trial, *_ in found.measured]),
            [psnr for *_, psnr in found.measured],
            is_logarithmic=domain.log_uniform is not None,
        )
        for name, domain in found.config.space.items()
    }


def _places(domain: Domain, values: list[Any]) -> list[Any]:
    """Where `values` stand on an axis: as numbers, or all by name when one is none."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values
    return [_name(domain, value) for value in values]
