"""Find the same picture twice among a million, by thumbnails. Knows numpy only: no files, no shards."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

MAX_BITS = 8
"""Bits of 64 in which hashes of near duplicates may differ."""
MIN_CORRELATION = 0.95
"""Of their thumbnails, beside a common slope: 0.99 after JPEG at quality 20 or a blur of 2 pixels."""
MIN_RELIEF = 2.0
"""Standard deviation of a thumbnail beside a slope, in levels: skies and walls are all alike below it."""

_ROTATION = 8
_NEIGHBOURS = 64
_CHUNK = 2**16
_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Twin:
    """A row whose picture another row has too."""

    bits: int
    """Bits in which their hashes differ; -1 when the pixels are the same."""
    row: int
    """The held-out one, if one of the two is trained on; the later one otherwise."""
    other: int


def equal_twins(contents: Array, *, heldout: Array) -> Iterator[Twin]:
    """Rows with the same (n,) content, each with the first of its kind, a training row if there is one."""
    # Held-out rows come last among equals, and so the first one is trained on where any is.
    order = np.lexsort((np.arange(len(contents)), heldout, contents))
    is_first = np.append(True, np.diff(contents[order]) != 0)[: len(order)]
    begins = np.flatnonzero(is_first)
    heads = order[np.repeat(begins, np.diff(begins, append=len(order)))]
    for row, head in zip(order[~is_first], heads[~is_first], strict=True):
        yield Twin(-1, int(row), int(head))


def difference_hashes(thumbnails: Array) -> Array:
    """(n, 16, 18) uint8 to (n,) uint64: whether each of 8 x 9 cells is darker than its right neighbour.

    Source: Krawetz, Kind of like that (dHash), 2013.
    """
    cells = thumbnails.reshape(-1, 8, 2, 9, 2).sum(axis=(2, 4), dtype=np.int32)
    bits = (cells[:, :, 1:] > cells[:, :, :-1]).reshape(-1, 64)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def near_twins(thumbnails: Array, *, groups: Array, heldout: Array) -> Iterator[Twin]:
    """Near duplicates, mirrored ones too, among (n, 16, 18) thumbnails whose (n,) `groups` differ.

    Of each row its nearest twin on its own side, and of a held-out row the nearest that is trained on.
    Mirrored ones count, because training mirrors patches anyway. Sorted by their hash, from each of eight
    places on in turn, every picture is compared with the 64 that follow: time n log n, and none within 7
    bits of each other is missed where no more than 64 share eight bits; beyond that most are found. A
    candidate counts when the thumbnails correlate. Source of the search: Manku, Jain and Das Sarma,
    Detecting near-duplicates for web crawling, WWW 2007.
    """
    nearest = {across: np.full(len(thumbnails), _NONE) for across in (False, True)}
    for row, other, bits in _alike_pairs(thumbnails, groups, heldout):
        is_across = heldout[row] != heldout[other]
        # One number orders by bits, and then by row.
        codes = bits.astype(np.int64) << 40 | other
        for across, best in nearest.items():
            wanted = is_across == across
            np.minimum.at(best, row[wanted], codes[wanted])
    for best in nearest.values():
        for place in np.flatnonzero(best != _NONE):
            yield Twin(int(best[place] >> 40), int(place), int(best[place] & (2**40 - 1)))


def _alike_pairs(thumbnails: Array, groups: Array, heldout: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Row, other and bits of near twins, some of them several times."""
    chosen = np.flatnonzero(_has_relief(thumbnails))
    for one, two, bits in _candidates(_both_hashes(thumbnails[chosen])):
        first, second = np.sort([chosen[one % len(chosen)], chosen[two % len(chosen)]], axis=0)
        mirrored = (one >= len(chosen)) != (two >= len(chosen))
        apart = groups[first] != groups[second]
        keep = _are_alike(thumbnails, first, second, mirrored, among=apart)
        turned = heldout[first] & ~heldout[second]
        row, other = np.where(turned, first, second), np.where(turned, second, first)
        yield row[keep], other[keep], bits[keep]


def _candidates(hashes: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Positions of two hashes, and the bits in which they differ, where those are few."""
    for rotation in range(0, 64, _ROTATION):
        turned = hashes << np.uint64(rotation) | hashes >> np.uint64((64 - rotation) % 64)
        order = np.argsort(turned)
        ordered = turned[order]
        for step in range(1, min(_NEIGHBOURS + 1, len(ordered))):
            bits = np.bitwise_count(ordered[step:] ^ ordered[:-step])
            near = np.flatnonzero(bits <= MAX_BITS)
            yield order[near], order[near + step], bits[near]


def _both_hashes(thumbnails: Array) -> Array:
    """(2n,): of the pictures, and then of their mirror images."""
    parts = [thumbnails, thumbnails[:, :, ::-1]]
    hashes = [difference_hashes(chunk) for part in parts for chunk in _chunks(part)]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])


def _has_relief(thumbnails: Array) -> Array:
    found = [_reliefs(chunk).any(axis=(1, 2)) for chunk in _chunks(thumbnails)]
    return np.concatenate([np.zeros(0, bool), *found])


def _are_alike(thumbnails: Array, first: Array, second: Array, mirrored: Array, *, among: Array) -> Array:
    """Whether thumbnails correlate; only `among` these pairs, False elsewhere."""
    alike = np.zeros(len(first), bool)
    for pairs in _chunks(np.flatnonzero(among)):
        one, two = _reliefs(thumbnails[first[pairs]]), _reliefs(thumbnails[second[pairs]])
        two = np.where(mirrored[pairs][:, None, None], two[:, :, ::-1], two)
        alike[pairs] = np.einsum("nij,nij->n", one, two) >= MIN_CORRELATION
    return alike


def _chunks(array: Array) -> Iterator[Array]:
    """Parts whose numbers in float32 are 75 MB at most."""
    return (array[begin : begin + _CHUNK] for begin in range(0, len(array), _CHUNK))


def _reliefs(thumbnails: Array) -> Array:
    """(n, 16, 18) float32 of norm 1 each, without mean and slope; zero where nothing much is left."""
    num_rows, num_columns = thumbnails.shape[1:]
    ones = np.ones((num_rows, num_columns), np.float32)
    down = np.linspace(-1, 1, num_rows, dtype=np.float32)[:, None]
    across = np.linspace(-1, 1, num_columns, dtype=np.float32)[None, :]
    left = thumbnails.astype(np.float32)
    for shape in (ones, ones * down, ones * across):
        unit = shape / np.linalg.norm(shape)
        left -= np.einsum("nij,ij->n", left, unit)[:, None, None] * unit
    norm = np.linalg.norm(left, axis=(1, 2), keepdims=True)
    has_relief = norm >= MIN_RELIEF * np.sqrt(num_rows * num_columns)
    return np.where(has_relief, left / np.maximum(norm, 1e-6), np.float32(0))
