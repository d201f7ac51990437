"""What became of a bulk run, as one page for people: `report.html`.

Reads the ledger a part at a time and keeps only what the page shows, so ten million rows cost no more memory
than ten. The page has no scripts and loads nothing. Names and messages come from strangers: every text is
escaped where an element is made, and what cannot be seen (control characters, changes of direction) is spelt
out. Knows no Ray.
"""

import base64
import hashlib
import heapq
import html
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdsr import codecs, provenance
from kdsr.config import EncodeConfig
from kdsr.errors import DataError, KeyNotFound, StoreError
from kdsr.image import Image
from kdsr.manifest import Records, Report
from kdsr.resize import resize
from kdsr.store import Store

NUM_SLOWEST = 20
MAX_FAILURES_A_CLASS = 100
"""Failed images that are shown of each class; all of them are in the ledger."""
OPEN_FAILURES = 10
"""Of those, how many are seen before a click."""
NUM_COMPARISONS = 6
NUM_CANDIDATES = 3 * NUM_COMPARISONS
"""Images that are looked at for a comparison: of some, input or result is gone or has changed."""
MAX_COMPARED_PIXELS = 40_000_000
MAX_COMPARED_BYTES = 64 * 2**20
SEARCHED_PIXELS = 1_000_000
"""More are thinned out before the part with most detail is looked for."""
CUTOUT = 320
"""Side of a cutout in pixels of the result."""
JPEG = EncodeConfig(quality=90)
MAX_TEXT = 600

STAGES = ("download", "decode", "wait", "net", "encode", "upload")
Row = dict[str, Any]


def write(report: Report, records: Records, *, source: Store, target: Store, command: str = "") -> str:
    """Write the page beside the ledger and return its uri; "" with a warning when that is not possible."""
    try:
        digest = Digest()
        for is_own, part in records.parts():
            digest.add(part, is_own=is_own)
        comparisons = list(islice(_comparisons(digest, source, target), NUM_COMPARISONS))
        return records.write_page(page(report, digest, comparisons, command=command))
    except Exception as error:  # noqa: BLE001 the run is done, whatever becomes of its page
        print(f"warning: report.html was not written: {type(error).__name__}: {error}", file=sys.stderr)
        return ""


# ---------------------------------------------------------------- what the ledger says


@dataclass
class Digest:
    """What the page shows of a ledger of any length."""

    results: int = 0
    megapixels: float = 0.0
    output_bytes: int = 0
    own_bytes: int = 0
    """Of the results of this start."""
    failed: Counter[str] = field(default_factory=Counter)
    """Images of this start, by class."""
    failures: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    """The first of each class."""
    slowest: list[Row] = field(default_factory=list)
    """Of all starts, the slowest first."""
    candidates: list[Row] = field(default_factory=list)
    """Results of all starts that can be shown, drawn by the hash that is their id."""

    def add(self, part: pa.Table, *, is_own: bool) -> None:
        """Count rows of the ledger; `is_own` when this start wrote them."""
        is_done = pc.equal(part["status"], "done")
        done = part.filter(is_done)
        num_bytes = int(pc.sum(done["output_bytes"]).as_py() or 0)
        self.results += len(done)
        self.megapixels += pc.sum(done["megapixels"]).as_py() or 0.0
        self.output_bytes += num_bytes
        if is_own:
            self.own_bytes += num_bytes
            self._add_failures(part.filter(pc.invert(is_done)))
        slow = self.slowest + _first(part, NUM_SLOWEST, by="seconds", order="descending")
        by_key = {row["key"]: row for row in sorted(slow, key=_duration)}
        self.slowest = heapq.nlargest(NUM_SLOWEST, by_key.values(), key=_duration)
        is_small = pc.and_(
            pc.less_equal(done["megapixels"], MAX_COMPARED_PIXELS / 1e6),
            pc.less_equal(done["output_bytes"], MAX_COMPARED_BYTES),
        )
        drawn = _first(done.filter(is_small), NUM_CANDIDATES, by="id", order="ascending")
        # A result that was made again after it was lost has two rows, alike if its bytes are.
        versions = {(row["id"], row["output_etag"]): row for row in self.candidates + drawn}
        self.candidates = [versions[name] for name in heapq.nsmallest(NUM_CANDIDATES, versions)]

    def _add_failures(self, failed: pa.Table) -> None:
        for count in pc.value_counts(failed["error_class"]).to_pylist():
            name = count["values"]
            self.failed[name] += count["counts"]
            missing = MAX_FAILURES_A_CLASS - len(self.failures[name])
            if missing > 0:
                same = failed.filter(pc.equal(failed["error_class"], name))
                self.failures[name] += same.slice(0, missing).to_pylist()


def _first(table: pa.Table, count: int, *, by: str, order: str) -> list[Row]:
    if not len(table):
        return []
    chosen = pc.select_k_unstable(table, k=min(count, len(table)), sort_keys=[(by, order)])
    return list(table.take(chosen).to_pylist())


def _duration(row: Row) -> float:
    return float(row["seconds"])


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True, eq=False)
class Comparison:
    """The same cutout of an input and of its result."""

    key: str
    before_size: tuple[int, int]
    after_size: tuple[int, int]
    """Width and height of the whole pictures."""
    before: bytes
    """JPEG, enlarged to the size of `after`."""
    after: bytes
    """JPEG, pixel for pixel."""


def _comparisons(digest: Digest, source: Store, target: Store) -> Iterator[Comparison]:
    for row in digest.candidates:
        try:
            yield compare(row, source, target)
        except (DataError, KeyNotFound):
            continue
        except StoreError as error:
            # It may answer none of the others either, each after all its retries.
            print(f"warning: report.html has fewer pictures: {error}", file=sys.stderr)
            return
        except Exception as error:  # noqa: BLE001 a picture that cannot be shown takes no other with it
            print(f"warning: {row['key']} is not in report.html: {error!r}", file=sys.stderr)


def compare(row: Row, source: Store, target: Store) -> Comparison:
    """Where input and result of a done `row` have the most detail, side by side, in sRGB.

    Raises DataError when a picture is too large or not what it was, KeyNotFound when one is gone.
    """
    if target.stat(row["target"]).etag != row["output_etag"]:
        raise DataError(f"{row['target']} is not as it was written")
    if source.stat(row["key"]).size > MAX_COMPARED_BYTES:
        raise DataError(f"{row['key']} is too large")
    before, after = _picture(source.get(row["key"])), _picture(target.get(row["target"]))
    factor = after.width / before.width
    height, width = (_cutout_side(side, factor) for side in (before.height, before.width))
    top, left = _busiest(before.pixels, height, width)
    enlarged_to = round(height * factor), round(width * factor)
    small = _cut(before, top, left, height, width)
    large = _cut(after, round(top * factor), round(left * factor), *enlarged_to)
    return Comparison(
        row["key"],
        (before.width, before.height),
        (after.width, after.height),
        codecs.encode(resize(small, large.height, large.width), format="jpeg", options=JPEG),
        codecs.encode(large, format="jpeg", options=JPEG),
    )


def _picture(data: bytes) -> Image:
    """The pixels alone: what else a file says about itself stays out of the page."""
    image = codecs.to_srgb(codecs.decode(data, max_pixels=MAX_COMPARED_PIXELS))
    return Image(image.rgb8().pixels)


def _cutout_side(side: int, factor: float) -> int:
    """Input pixels of a side that become `CUTOUT`, or all that there are."""
    return max(1, min(side, round(CUTOUT / factor)))


def _busiest(pixels: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Top and left of the window of (H, W, 3) uint8 in which neighbours differ most, about."""
    step = math.ceil(math.sqrt(pixels.shape[0] * pixels.shape[1] / SEARCHED_PIXELS))
    height, width = max(1, height // step), max(1, width // step)
    green = pixels[::step, ::step, 1].astype(np.float64)
    change = np.zeros((green.shape[0] + 1, green.shape[1] + 1))
    change[2:, 1:] += np.abs(np.diff(green, axis=0))
    change[1:, 2:] += np.abs(np.diff(green, axis=1))
    sums = change.cumsum(axis=0).cumsum(axis=1)
    bands = sums[height:] - sums[:-height]
    windows = bands[:, width:] - bands[:, :-width]
    top, left = np.unravel_index(np.argmax(windows), windows.shape)
    return int(top) * step, int(left) * step


def _cut(image: Image, top: int, left: int, height: int, width: int) -> Image:
    return Image(np.ascontiguousarray(image.pixels[top : top + height, left : left + width]))


# ---------------------------------------------------------------- the page


class Markup(str):
    """HTML. Any other text is escaped before it becomes part of some."""


def element(name: str, *content: str, **attributes: str | int | float) -> Markup:
    """`<name attributes>content</name>`; `class_` stands for class. Content that is no Markup is escaped."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"' for key, value in attributes.items()
    )
    inner = "".join(part if isinstance(part, Markup) else _escaped(part) for part in content)
    return Markup(f"<{name}{shown}>{inner}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """Parts one after the other."""
    return Markup("".join(part if isinstance(part, Markup) else _escaped(part) for part in parts))


def _escaped(text: str) -> str:
    return html.escape(_visible(text))


def _visible(text: str) -> str:
    """`text` with what has no shape, or turns the direction of what follows, written as in Python."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text
    )


def page(report: Report, digest: Digest, comparisons: list[Comparison], *, command: str = "") -> str:
    """The whole document."""
    body = joined(
        [
            _head_lines(report),
            _totals(report, digest),
            _failed(report, digest),
            _before_and_after(comparisons),
            _where_the_time_goes(report),
            _slowest(digest),
            _about(report, command),
        ]
    )
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{_style_digest()}'; base-uri 'none'"
    head = joined(
        [
            Markup('<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            Markup('<meta name="referrer" content="no-referrer">'),
            element("title", _headline(report)),
            Markup(f"<style>{STYLE}</style>"),
        ]
    )
    document = element("html", element("head", head), element("body", element("main", body)), lang="en")
    return f"<!doctype html>\n{document}\n"


def _style_digest() -> str:
    return base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()


def _headline(report: Report) -> str:
    if report.ok:
        return "The image is done" if report.listed == 1 else f"All {report.listed:,} images are done"
    lost = f", {report.missing:,} unaccounted for" if report.missing else ""
    return f"{report.failed:,} of {report.listed:,} images failed{lost}"


def _head_lines(report: Report) -> Markup:
    return element(
        "header",
        element("p", "Upscaling run ", element("code", report.run), f", finished {provenance.now()}"),
        element("h1", _headline(report), class_="good" if report.ok else "bad"),
        element("p", _name(report.input), " → ", _name(report.output)),
    )


def _name(text: str) -> Markup:
    """A key or a message, which must not change the direction of what stands beside it."""
    return element("bdi", text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…")


def _section(title: str, *content: str) -> Markup:
    return element("section", element("h2", title), *content)


def _totals(report: Report, digest: Digest) -> Markup:
    finished = report.done + report.failed
    figures = [
        ("listed", f"{report.listed:,}"),
        ("done", f"{report.done:,}"),
        ("skipped, done before", f"{report.skipped:,}"),
        ("failed", f"{report.failed:,}"),
        *([("unaccounted for", f"{report.missing:,}")] if report.missing else []),
        ("images a second", _rate(finished, report.seconds)),
        ("output Mpx a second", _rate(report.output_megapixels, report.seconds)),
        ("output Mpx", f"{report.output_megapixels:,.1f}"),
        ("written", _bytes(digest.own_bytes)),
        ("from start to end", _seconds(report.seconds)),
    ]
    tiles = [element("div", element("dd", value), element("dt", name)) for name, value in figures]
    parts = [element("dl", *tiles, class_="tiles")]
    if digest.results > report.done:
        parts.append(
            element(
                "p",
                f"All starts of this run together: {digest.results:,} results, {digest.megapixels:,.1f} Mpx, "
                f"{_bytes(digest.output_bytes)}.",
                class_="note",
            )
        )
    return _section("This start", *parts)


CLASSES = {
    "corrupt": "named like an image, and broken or cut off",
    "unsupported": "no image, or of a kind that is not handled",
    "too_large": "beyond max_pixels, max_frames, the limit of its format, or memory",
    "store": "the store did not give or take it, also after retries",
    "internal": "a bug, or an image over which workers died",
}


def _failed(report: Report, digest: Digest) -> Markup:
    if not digest.failed:
        return Markup()
    parts = [_failed_class(name, count, digest.failures[name]) for name, count in digest.failed.most_common()]
    if report.replay:
        parts.insert(0, element("pre", element("code", report.replay)))
        parts.insert(0, element("p", "This does just these again:"))
    return _section("Failed", *parts)


def _failed_class(name: str, count: int, rows: list[Row]) -> Markup:
    cards = [_failure(row) for row in rows]
    parts = [
        element("h3", f"{name or 'unknown'}: {count:,}"),
        element("p", CLASSES.get(name, ""), class_="note"),
        element("ul", *cards[:OPEN_FAILURES], class_="cards"),
    ]
    if cards[OPEN_FAILURES:]:
        summary = element("summary", f"{len(cards) - OPEN_FAILURES:,} more")
        parts.append(element("details", summary, element("ul", *cards[OPEN_FAILURES:], class_="cards")))
    if count > len(cards):
        parts.append(element("p", f"The other {count - len(cards):,} are in the ledger.", class_="note"))
    return joined(parts)


def _failure(row: Row) -> Markup:
    attempts = "1 attempt" if row["attempts"] == 1 else f"{row['attempts']} attempts"
    where = f"{row['stage'] or 'unknown stage'}, {attempts}, {_seconds(row['seconds'])}"
    return element(
        "li",
        element("strong", _name(row["key"])),
        element("span", where, class_="note"),
        element("span", _name(row["message"])),
    )


def _before_and_after(comparisons: list[Comparison]) -> Markup:
    if not comparisons:
        return Markup()
    note = element(
        "p",
        "Left the input, enlarged by Lanczos; right the result, pixel for pixel. The part with most detail "
        "of a few images, drawn by chance.",
        class_="note",
    )
    return _section("Before and after", note, element("div", *map(_figure, comparisons), class_="pairs"))


def _figure(comparison: Comparison) -> Markup:
    sizes = [f"{width} × {height}" for width, height in (comparison.before_size, comparison.after_size)]
    images = [
        _image(data, f"{word} {comparison.key}")
        for data, word in ((comparison.before, "before:"), (comparison.after, "after:"))
    ]
    caption = element("figcaption", _name(comparison.key), element("span", " → ".join(sizes), class_="note"))
    return element("figure", element("div", *images, class_="pair"), caption)


def _image(data: bytes, description: str) -> Markup:
    encoded = base64.b64encode(data).decode()
    return Markup(f'<img alt="{_escaped(description)}" src="data:image/jpeg;base64,{encoded}">')


def _where_the_time_goes(report: Report) -> Markup:
    stages = report.stage_seconds
    longest = max(stages.values(), default=0.0)
    rows = [_stage_row(name, spent, _bar(spent, longest)) for name, spent in stages.items()]
    rows.append(_stage_row("wall clock", report.seconds, Markup()))
    note = element(
        "p",
        "Added up over all threads of all workers, so the stages may come to more than the wall clock; "
        "wait is for memory that other images held.",
        class_="note",
    )
    return _section("Where the time goes", _table(rows), note)


def _stage_row(name: str, spent: float, bar: Markup) -> Markup:
    title = element("th", name, scope="row")
    return element("tr", title, element("td", _seconds(spent)), element("td", bar, class_="bar"))


def _bar(value: float, longest: float) -> Markup:
    width = f"{100 * value / longest:.1f}%" if longest else "0"
    rectangle = element("rect", width=width, height=12, rx=2)
    return element("svg", rectangle, width="100%", height=12, aria_hidden="true")


def _slowest(digest: Digest) -> Markup:
    if not digest.slowest:
        return Markup()
    titles = ("image", "took", "of it most", "result")
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    return _section("Slowest images", _table([head, *map(_slow_row, digest.slowest)]))


def _slow_row(row: Row) -> Markup:
    stage = max(STAGES, key=lambda name: row[f"{name}_seconds"])
    most = f"{stage} {_seconds(row[f'{stage}_seconds'])}"
    done = f"{row['megapixels']:.2f} Mpx, {_bytes(row['output_bytes'])}"
    return element(
        "tr",
        element("th", _name(row["key"]), scope="row"),
        element("td", _seconds(row["seconds"])),
        element("td", most),
        element("td", done if row["status"] == "done" else "failed"),
    )


def _table(rows: list[Markup]) -> Markup:
    return element("div", element("table", *rows), class_="scroll")


def _about(report: Report, command: str) -> Markup:
    facts = [
        ("model", f"{report.model}, sha256 {report.model_sha256}"),
        ("number type", report.precision),
        ("ledger", f"{report.output}/_kdsr/runs/{report.run}/status"),
        ("this start", command),
    ]
    shown = ((element("dt", name), element("dd", _name(value))) for name, value in facts if value)
    rows = [element("div", *pair) for pair in shown]
    return _section("About this run", element("dl", *rows, class_="facts"))


# ---------------------------------------------------------------- numbers


def _rate(count: float, seconds: float) -> str:
    return f"{count / seconds:,.2f}" if count and seconds > 0 else "–"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


def _seconds(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1f; --faint: #62626b; --line: #dcdce2;
  --tile: #f5f5f8; --bar: #3b6fd4; --good: #146c2e; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --paper: #141417; --ink: #e8e8ec; --faint: #a0a0aa;
  --line: #34343c; --tile: #1f1f24; --bar: #7aa2f7; --good: #7fd491; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 1rem }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 3rem }
header p { margin: 0; color: var(--faint); overflow-wrap: anywhere }
h1 { margin: .25rem 0 .5rem; font-size: 1.6rem; line-height: 1.2 }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.15rem;
  border-bottom: 1px solid var(--line); padding-bottom: .3rem }
h3 { margin: 1.25rem 0 0; font-size: 1rem }
p { margin: .4rem 0 }
.good { color: var(--good) }
.bad { color: var(--bad) }
.note { color: var(--faint); font-size: .9rem }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .875rem }
pre { margin: .5rem 0; padding: .75rem; background: var(--tile); border: 1px solid var(--line);
  border-radius: 6px; overflow-x: auto }
dl, dd, ul, figure { margin: 0; padding: 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem }
.tiles div { display: flex; flex-direction: column; background: var(--tile); border-radius: 6px;
  padding: .6rem .75rem }
.tiles dd { font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.tiles dt, .facts dt { color: var(--faint); font-size: .85rem }
.cards { list-style: none }
.cards li { display: flex; flex-direction: column; padding: .55rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere }
summary { cursor: pointer; padding: .5rem 0 }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px }
.pair img { width: 100%; height: auto; display: block; border-radius: 4px }
figcaption { display: flex; flex-direction: column; margin-top: .35rem; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; font-weight: normal; padding: .35rem .9rem .35rem 0;
  border-bottom: 1px solid var(--line); white-space: nowrap }
tr > th:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem }
th[scope=col] { color: var(--faint); font-size: .85rem }
.bar { width: 55% }
rect { fill: var(--bar) }
svg { display: block; margin-top: .35rem }
.facts div { padding: .35rem 0; overflow-wrap: anywhere }
"""
