"""The page of a bulk run: what it says, what it must not let through, and how little it keeps."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from kdsr import codecs
from kdsr.image import Image
from kdsr.manifest import Records, Report, Status, statuses_to_table
from kdsr.resize import resize
from kdsr.store import open_store
from kdsr.upscale_report import (
    CUTOUT,
    MAX_FAILURES_A_CLASS,
    NUM_CANDIDATES,
    NUM_COMPARISONS,
    NUM_SLOWEST,
    Digest,
    write,
)

RUN = "ab" * 8
SCALE = 4


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.style = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += f" {data}"

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self):
        return " ".join(self.text.split())


@pytest.fixture
def source(tmp_path):
    return open_store(str(tmp_path / "in"))


@pytest.fixture
def output(tmp_path):
    return open_store(str(tmp_path / "out"))


def report(**changes):
    sums = {"listed": 6, "done": 3, "skipped": 2, "failed": 1, "output_megapixels": 31.42, "seconds": 2.0}
    names = {"run": RUN, "input": "file:///in", "output": "file:///out", "model": "m", "model_sha256": "x"}
    stages = {"start Ray": 4.0, "net": 90.5, "upload": 0.25}
    return Report(**names | {"failed_keys": {}, "stage_seconds": stages} | sums | changes)


def row(key="a.png", **changes):
    id_ = hashlib.sha256(key.encode()).hexdigest()[:32]
    return replace(Status(id_, key, key, "done", seconds=1.0, megapixels=1.0, output_bytes=1000), **changes)


def failed(key="bad.png", **changes):
    defaults = {"stage": "decode", "error_class": "corrupt", "message": "cut off"}
    return row(key, status="failed", megapixels=0.0, output_bytes=0, **defaults | changes)


def written(statuses, source, output, sums=None, **options):
    records = Records(output, RUN)
    records.append(statuses)
    uri = write(sums or report(), records, source=source, target=output, **options)
    assert uri == f"{output.uri}/_kdsr/runs/{RUN}/report.html"
    return output.get(f"_kdsr/runs/{RUN}/report.html").decode()


def upscaled(key, source, output, *, pixels):
    """An input, its result of four times the size, and the row of the two."""
    image = Image(pixels)
    source.put(key, codecs.encode(image, format="png"))
    result = resize(image, SCALE * image.height, SCALE * image.width)
    info = output.put(key, codecs.encode(result, format="png"))
    return row(
        key, output_etag=info.etag, output_bytes=info.size, megapixels=result.height * result.width / 1e6
    )


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def shown_pictures(text):
    """(H, W, 3) of each picture in the page."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    return [codecs.decode(base64.b64decode(data), max_pixels=10**7).pixels for data in found]


# ---------------------------------------------------------------- what it says


def test_the_page_tells_the_sums_and_where_the_time_went(source, output):
    page = Page(written([row(output_bytes=2_500_000)], source, output, command="python jobs/upscale.py -i x"))
    words = page.words()
    for text in ("6 listed", "3 done", "2 skipped", "1 failed", "15.71 output Mpx a second", "2.00 images a"):
        assert text in words
    assert "2.5 MB written" in words
    assert "start Ray 4.0 s net 90.5 s upload 250 ms wall clock 2.0 s" in words
    assert "python jobs/upscale.py -i x" in words


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({}, "1 of 6 images failed"),
        ({"failed": 0, "done": 4}, "All 6 images are done"),
        ({"done": 2}, "1 of 6 images failed, 1 unaccounted for"),
    ],
)
def test_the_headline_says_how_it_ended(source, output, changes, headline):
    assert headline in Page(written([], source, output, report(**changes))).words()


def test_failures_are_grouped_by_class_with_stage_cause_attempts_and_the_command_for_them(source, output):
    rows = [
        failed("one.jpg"),
        failed("two.jpg", message="first cause", attempts=3),
        failed("three.jpg", stage="upload", error_class="store", message="no answer"),
    ]
    words = Page(written(rows, source, output, report(replay="python jobs/upscale.py --again"))).words()
    corrupt, store = words.index("corrupt: 2"), words.index("store: 1")
    assert corrupt < words.index("one.jpg decode, 1 attempt, 1.0 s cut off") < store
    assert corrupt < words.index("two.jpg decode, 3 attempts, 1.0 s first cause") < store
    assert store < words.index("three.jpg upload, 1 attempt, 1.0 s no answer")
    assert "python jobs/upscale.py --again" in words


def test_a_failure_of_an_earlier_start_is_told_no_more_but_its_results_count(source, output):
    Records(output, RUN).append([failed("healed.png"), row("early.png", megapixels=5.0)])
    words = Page(written([row("healed.png")], source, output, report(done=1, skipped=5, failed=0))).words()
    assert "corrupt" not in words
    assert "All starts of this run together: 2 results, 6.0 Mpx, 2.0 kB." in words
    assert words.index("1.0 kB written") < words.index("All starts")


def test_the_slowest_image_comes_first_and_once(source, output):
    for seconds in (7.0, 70.0):
        Records(output, RUN).append([row("twice.png", seconds=seconds)])
    rows = [row("twice.png", seconds=80.0, net_seconds=79.0), row("quick.png", seconds=0.002)]
    words = Page(written(rows, source, output)).words()
    slowest = words[words.index("Slowest images") :]
    assert slowest.index("twice.png 80.0 s net 79.0 s 1.00 Mpx, 1.0 kB") < slowest.index("quick.png 2 ms")
    assert slowest.count("twice.png") == 1


def test_a_run_with_nothing_to_do_has_a_page_too(source, output):
    words = Page(written([], source, output, report(done=0, failed=0, skipped=6))).words()
    assert "All 6 images are done" in words
    assert "6 skipped" in words


# ---------------------------------------------------------------- before and after


def test_the_part_with_most_detail_is_shown_enlarged_beside_its_result(source, output):
    pixels = np.full((400, 600, 3), 128, np.uint8)
    pixels[250:330, 450:530] = noise(80, 80)
    text = written([upscaled("a.png", source, output, pixels=pixels)], source, output)
    before, after = shown_pictures(text)
    assert before.shape == after.shape == (CUTOUT, CUTOUT, 3)
    # The resize that made this result also enlarges the input, so both show the same.
    assert np.abs(before.astype(int) - after).mean() < 4
    assert after.std() > 40
    assert "600 × 400 → 2400 × 1600" in Page(text).words()


def test_a_picture_smaller_than_a_cutout_is_shown_whole(source, output):
    pixels = noise(9, 5)
    before, after = shown_pictures(
        written([upscaled("i.png", source, output, pixels=pixels)], source, output)
    )
    assert before.shape == after.shape == (36, 20, 3)


def test_what_was_changed_lost_or_broken_since_is_not_shown(source, output):
    rows = [upscaled(f"{n}.png", source, output, pixels=noise(8, 8, n)) for n in range(4)]
    source.delete("0.png")
    output.delete("1.png")
    output.put("2.png", codecs.encode(Image(noise(8, 8)), format="png"))
    source.put("3.png", b"no picture")
    assert shown_pictures(written(rows, source, output)) == []


def test_only_a_handful_of_pictures_is_shown(source, output):
    rows = [upscaled(f"{n}.png", source, output, pixels=noise(8, 8, n)) for n in range(NUM_COMPARISONS + 2)]
    assert len(shown_pictures(written(rows, source, output))) == 2 * NUM_COMPARISONS


def test_deep_grey_and_transparent_pictures_are_shown(source, output):
    for number, image in enumerate(
        [
            Image(np.full((8, 8, 1), 65535, np.uint16)),
            Image(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)),
        ]
    ):
        data = codecs.encode(image, format="png")
        source.put(f"{number}.png", data)
        etag = output.put(f"{number}.png", data).etag
        rows = [row(f"{number}.png", output_etag=etag)]
        assert [picture.min() for picture in shown_pictures(written(rows, source, output))[:2]] == [255, 255]


# ---------------------------------------------------------------- what it does not let through

HOSTILE = [
    "<script>alert(1)</script>.png",
    "\"><img src=x onerror=alert(1)>'.png",
    "</style></main></body>&lt;b&gt;.png",
    "a\u202egnp.exe",
    "tab\tand\x1b[31mnew\nline.png",
    "-->]]><!--.png",
]


def test_names_and_causes_from_strangers_stay_text(source, output):
    rows = [failed(name, message=f"cause {name}", error_class=name) for name in HOSTILE]
    named = report(replay=f"python x {HOSTILE[0]}", input=f"file:///{HOSTILE[1]}", model=HOSTILE[2])
    text = written(rows, source, output, named, command=HOSTILE[5])
    page = Page(text)
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "link", "iframe", "a", "b", "form", "object"}
    )
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for name in HOSTILE[:3]:
        assert f"cause {name}" in page.text
    assert "a\\u202egnp.exe" in page.text
    assert "tab\\tand\\x1b[31mnew\\nline.png" in page.text
    assert "\u202e" not in text


def test_a_hostile_name_of_a_picture_stays_in_its_description(source, output):
    key = HOSTILE[1]
    text = written([upscaled(key, source, output, pixels=noise(8, 8))], source, output)
    assert [image["alt"] for image in Page(text).all("img")] == [f"before: {key}", f"after: {key}"]


def test_the_page_loads_nothing_and_says_so_to_the_browser(source, output):
    text = written([upscaled("a.png", source, output, pixels=noise(8, 8)), failed()], source, output)
    page = Page(text)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy.split("; ")[:3] == ["default-src 'none'", "img-src data:", f"style-src 'sha256-{digest}'"]
    for _, attributes in page.elements:
        assert "href" not in attributes
        assert "style" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:image/jpeg") or "src" not in attributes
    assert "url(" not in page.style
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in page.style


def test_a_very_long_cause_is_cut(source, output):
    assert len(written([failed(message="x" * 10**6)], source, output)) < 50_000


# ---------------------------------------------------------------- how little it keeps, and what may go wrong


def test_what_is_kept_does_not_grow_with_the_ledger(source, output):
    digest = Digest()
    for part in range(4):
        rows = [row(f"{part}-{n}.png", seconds=n) for n in range(500)]
        rows += [failed(f"bad-{part}-{n}.png", seconds=0.0) for n in range(500)]
        digest.add(statuses_to_table(rows), is_own=True)
    assert (digest.results, digest.failed) == (2000, {"corrupt": 2000})
    assert [found["seconds"] for found in digest.slowest[:5]] == [499, 499, 499, 499, 498]
    kept = len(digest.slowest), len(digest.candidates), len(digest.failures["corrupt"])
    assert kept == (NUM_SLOWEST, NUM_CANDIDATES, MAX_FAILURES_A_CLASS)


def test_failures_beyond_those_shown_are_counted(source, output):
    rows = [failed(f"{n}.png") for n in range(MAX_FAILURES_A_CLASS + 7)]
    words = Page(written(rows, source, output)).words()
    assert f"corrupt: {MAX_FAILURES_A_CLASS + 7}" in words
    assert "The other 7 are in the ledger." in words


def test_a_page_that_cannot_be_written_is_a_warning(source, output, capsys):
    records = Records(output, RUN)
    output.put(f"_kdsr/runs/{RUN}/report.html/taken", b"")
    assert write(report(), records, source=source, target=output) == ""
    assert "warning: report.html was not written" in capsys.readouterr().err


def test_a_broken_part_of_the_ledger_is_a_warning(source, output, capsys):
    output.put(f"_kdsr/runs/{RUN}/status/x-000000.parquet", b"no parquet")
    assert write(report(), Records(output, RUN), source=source, target=output) == ""
    assert "warning: " in capsys.readouterr().err


def test_the_page_of_an_earlier_start_goes_when_a_run_begins(source, output):
    written([row()], source, output)
    Records(output, RUN).plan([])
    assert not output.exists(f"_kdsr/runs/{RUN}/report.html")
