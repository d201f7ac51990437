"""Errors cross process borders, so each must survive pickling with its text and its branch."""

import inspect
import pickle

import pytest

from kdsr import errors
from kdsr.errors import Abandoned, DataError, KdsrError, RequestError, ServerError, StoreError

CLASSES = [
    member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, KdsrError)
]


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_survives_the_way_to_another_process(error_class):
    error = pickle.loads(pickle.dumps(error_class("x.parquet: expected sha256 a, got b")))
    assert type(error) is error_class
    assert str(error) == "x.parquet: expected sha256 a, got b"


@pytest.mark.parametrize("error_class", [each for each in CLASSES if each is not KdsrError])
def test_every_error_says_who_has_to_act(error_class):
    branches = (RequestError, StoreError, ServerError, DataError, Abandoned)
    assert sum(issubclass(error_class, branch) for branch in branches) == 1


@pytest.mark.parametrize("error_class", CLASSES)
def test_the_tree_in_the_docstring_is_complete(error_class):
    assert error_class.__name__ in errors.__doc__
