"""What stored things say of themselves."""

import pytest
from pydantic import ValidationError

from kdsr.spec import Card, EspcnSpec, ShardEntry

CARD = Card(name="mini", spec=EspcnSpec(scale=2), num_parameters=12345, sha256="0" * 64)


def test_a_card_tells_size_and_quality() -> None:
    measured = CARD.model_copy(update={"metrics": {"heldout_psnr_y": 31.257}})
    assert measured.sentence() == "mini: 12,345 parameters, 31.26 dB on held-out images"
    assert CARD.sentence() == "mini: 12,345 parameters, nothing held out to measure on"


def test_a_card_comes_back_from_its_json() -> None:
    assert Card.model_validate_json(CARD.model_dump_json()) == CARD


def test_a_misspelt_field_of_a_spec_is_refused() -> None:
    with pytest.raises(ValidationError, match="num_featurez"):
        EspcnSpec(scale=2, num_featurez=8)  # type: ignore[call-arg]


def test_a_shard_has_the_rows_of_its_row_groups() -> None:
    entry = ShardEntry(key="a", sha256="0", num_bytes=1, row_groups=[3, 4], num_images=2, num_heldout_rows=0)
    assert entry.num_rows == 7
