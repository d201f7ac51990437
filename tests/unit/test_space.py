"""Draws from a space, and values put into fields of a run."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdsr.space import Domain, draw, overlapping, with_value

FIELDS = {
    "terms": [{"kind": "pixel", "weight": 1.0}],
    "optimizer": {"learning_rate": 1e-3, "clip_norm": None},
}
DOMAINS = {
    "a": Domain(uniform=(-1, 2)),
    "b": Domain(log_uniform=(1e-4, 1e-2)),
    "c": Domain(integer=(4, 18), step=4),
    "d": Domain(choice=("x", ["y"], {"z": 1})),
}


@given(number=st.integers(0, 10**6), seed=st.integers(0, 10**6))
def test_values_lie_in_their_domain(number, seed):
    values = draw(DOMAINS, seed=seed, number=number)
    assert -1 <= values["a"] <= 2 and 1e-4 <= values["b"] <= 1e-2
    assert values["c"] in {4, 8, 12, 16} and values["d"] in ("x", ["y"], {"z": 1})


def test_every_value_of_integer_and_choice_is_drawn():
    drawn = [draw(DOMAINS, seed=0, number=number) for number in range(200)]
    assert {each["c"] for each in drawn} == {4, 8, 12, 16}
    assert {str(each["d"]) for each in drawn} == {"x", "['y']", "{'z': 1}"}


def test_log_uniform_gives_each_factor_of_ten_its_share():
    drawn = [DOMAINS["b"].draw(Random(number)) for number in range(2000)]
    assert 0.45 < sum(value < 1e-3 for value in drawn) / len(drawn) < 0.55


def test_a_draw_depends_on_its_trial_and_field_alone():
    fewer = {"a": DOMAINS["a"]}
    assert draw(fewer, seed=1, number=5)["a"] == draw(DOMAINS, seed=1, number=5)["a"]
    assert len({draw(DOMAINS, seed=seed, number=n)["a"] for seed in range(3) for n in range(10)}) == 30


@pytest.mark.parametrize(
    ("domain", "says"),
    [
        ({}, "found none"),
        ({"uniform": [0, 1], "choice": [1]}, "found uniform and choice"),
        ({"uniform": [1, 0]}, "run upwards"),
        ({"uniform": [0, float("inf")]}, "finite"),
        ({"log_uniform": [0, 1]}, "above 0"),
        ({"uniform": [0, 1], "step": 2}, "step belongs to integer"),
        ({"choice": []}, "at least 1"),
    ],
)
def test_a_domain_that_is_none_is_refused(domain, says):
    with pytest.raises(ValidationError, match=says):
        Domain.model_validate(domain)


def test_a_value_is_put_where_the_dots_lead_and_nothing_else_changes():
    changed = with_value(FIELDS, "terms.0.weight", 0.25)
    assert changed["terms"] == [{"kind": "pixel", "weight": 0.25}]
    assert changed["optimizer"] == FIELDS["optimizer"] and FIELDS["terms"][0]["weight"] == 1.0
    assert with_value(FIELDS, "terms", [])["terms"] == []


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("optimizer.learning_rat", "did you mean learning_rate"),
        ("terms.1.weight", "'1' is no position in a list of 1"),
        ("terms.first.weight", "'first' is no position"),
        ("optimizer.clip_norm.x", "not set"),
    ],
)
def test_a_field_that_is_not_there_is_refused_by_name(path, says):
    with pytest.raises(ValueError, match=says):
        with_value(FIELDS, path, 1)


def test_a_part_of_another_field_is_found():
    assert overlapping(["terms.0.weight", "seed", "terms"]) == ("terms", "terms.0.weight")
    assert overlapping(["terms.0.weight", "terms.1.weight", "terms2"]) is None
