"""The page at / as people meet it, in a real browser."""

import asyncio
import io
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from kdsr.client import Client
from kdsr.config import ServeConfig
from kdsr.serving.app import build_app
from kdsr.serving.contract import Refusal
from kdsr.serving.keys import new_key, read_keys
from tests.small_server import InProcess, Server, encoded, listening, save_tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here to look at the page with: apt-get install chromium"
)
PATIENCE_MS = 90_000
PNG = {"name": "small bee.png", "mimeType": "image/png", "buffer": encoded(height=30, width=40)}
DARK = {"color_scheme": "dark", "reduced_motion": "reduce"}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


class Moody(InProcess):
    """A backend that is busy for as many calls as it is told, or takes its time."""

    def __init__(self, host):
        super().__init__(host)
        self.refusals, self.wait_seconds = 0, 1
        self.is_slow = False

    async def upscale(self, call):
        while self.is_slow:
            await asyncio.sleep(0.02)
        if self.refusals:
            self.refusals -= 1
            return Refusal("busy", "too much is waiting already; try again later", self.wait_seconds)
        return await super().upscale(call)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return {"tiny": [save_tiny(folder / f"x{scale}", scale=scale)[0] for scale in (2, 4)]}


@contextmanager
def serving(models, **fields):
    limits = {"max_body_bytes": 200_000, "max_pixels": 120 * 120}
    given = {"models": models, "auth": "none", "precision": "float32", "limits": limits}
    server = Server(ServeConfig.model_validate(given | fields))
    backend = Moody(server.host)
    with listening(build_app(server.config, backend, read_keys(server.config))) as address:
        yield address, backend
    server.host.close()


@pytest.fixture(scope="module")
def served(models):
    with serving(models) as both:
        yield both


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own walls need rights that a container lacks; it only sees this server.
        yield playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=2 * PATIENCE_MS
        )


@pytest.fixture
def visit(browser, served):
    """Opens the page; at the end nothing was asked of another host and no script failed."""
    contexts, faults, urls = [], [], []

    def open_page(address=served[0], **options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE_MS)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if "Security Policy" in line.text else None)
        page.on("request", lambda request: urls.append(request.url))
        page.goto(address)
        return page

    yield open_page
    served[1].is_slow, served[1].refusals, served[1].wait_seconds = False, 0, 1
    for context in contexts:
        context.close()
    assert faults == []
    assert [url for url in urls if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:"))] == []


def pick(page, file=PNG):
    page.wait_for_selector("#scales input")
    page.set_input_files("#file", file)


def upscale(page, file=PNG):
    pick(page, file)
    page.click("#start:enabled")
    page.wait_for_selector("#result", state="visible")


def trouble(page):
    page.wait_for_selector("#trouble", state="visible")
    return page.inner_text("#trouble-text")


def share_of_original(page):
    """In percent, as it is seen: where the original ends."""
    return page.evaluate("parseFloat(getComputedStyle(document.querySelector('#divider')).left) * 100"
                         " / document.querySelector('#compare').clientWidth")  # fmt: skip


def loupe(page, canvas):
    return page.evaluate(f"document.querySelector('#{canvas}').toDataURL()")


def keep(page, name):
    """A picture of the page, for people; kept where KDSR_SCREENSHOTS says."""
    shot = page.screenshot(full_page=True)
    if "KDSR_SCREENSHOTS" in os.environ:
        (Path(os.environ["KDSR_SCREENSHOTS"]) / f"{name}.png").write_bytes(shot)
    return np.asarray(PIL.Image.open(io.BytesIO(shot)).convert("RGB"))


def test_a_picture_is_upscaled_and_what_was_done_is_told(visit, served):
    page = visit()
    pick(page)
    page.check("input[name=scale][value='2']")
    page.select_option("#format", "webp")
    page.click("#start:enabled")
    page.wait_for_selector("#result", state="visible")
    facts = page.inner_text("#facts")
    for text in ("40 × 30", "80 × 60", "tiny-x2", "WEBP"):
        assert text in facts
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "small bee_x2.webp"
    with Client(served[0]) as client:
        expected = client.upscale(PNG["buffer"], scale=2, format="webp")
    assert Path(download.value.path()).read_bytes() == expected


def test_results_that_are_seen_no_more_are_not_kept(visit):
    page = visit()
    upscale(page)
    first = page.get_attribute("#download", "href")
    page.evaluate(
        """() => {
          const revoke = URL.revokeObjectURL;
          window.forgotten = [];
          URL.revokeObjectURL = (url) => (forgotten.push(url), revoke.call(URL, url));
        }"""
    )
    page.check("input[name=scale][value='2']")
    page.click("#start:enabled")
    page.wait_for_function("first => document.querySelector('#download').href !== first", arg=first)
    assert page.evaluate("forgotten") == [first]


def test_the_slider_follows_keys_and_mouse(visit):
    page = visit()
    upscale(page)
    assert share_of_original(page) == pytest.approx(50, abs=1)
    assert page.evaluate("document.activeElement.id") == "slider"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert 52 <= share_of_original(page) <= 70
    assert re.fullmatch(r"\d+ percent original", page.get_attribute("#slider", "aria-valuetext"))
    box = page.locator("#compare").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert share_of_original(page) == pytest.approx(20, abs=2)


def test_the_loupe_shows_the_same_part_of_both_and_follows_pointer_and_keys(visit):
    page = visit()
    upscale(page)
    page.check("input[name=zoom][value='8']")
    seen = {(loupe(page, "loupe-before"), loupe(page, "loupe-after"))}
    page.hover("#slider", position={"x": 20, "y": 20})
    seen.add((loupe(page, "loupe-before"), loupe(page, "loupe-after")))
    page.focus("#marker")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    seen.add((loupe(page, "loupe-before"), loupe(page, "loupe-after")))
    assert len({before for before, _ in seen}) == len({after for _, after in seen}) == 3


def test_a_picture_can_be_dropped_and_pasted(visit):
    page = visit()
    page.wait_for_selector("#scales input")
    page.evaluate(
        """async (bytes) => {
          window.data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], 'dropped.png', {type: 'image/png'}));
          const how = {dataTransfer: data, bubbles: true, cancelable: true};
          for (const name of ['dragenter', 'dragover', 'drop'])
            document.body.dispatchEvent(new DragEvent(name, how));
        }""",
        list(PNG["buffer"]),
    )
    page.wait_for_selector("#preview", state="visible")
    assert "dropped.png" in page.get_attribute("#preview-image", "alt")
    page.click("#start:enabled")
    page.wait_for_selector("#result", state="visible")
    page.evaluate("document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))")
    page.wait_for_selector("#preview", state="visible")
    assert page.is_hidden("#result")


def test_a_wrong_file_is_told_in_plain_words(visit):
    page = visit()
    upscale(page)
    pick(page, {"name": "letter.txt", "mimeType": "text/plain", "buffer": b"Dear all"})
    page.wait_for_selector("#preview-note", state="visible")
    page.click("#start:enabled")
    assert trouble(page).startswith("This is not a picture that can be read.")
    assert page.is_hidden("#again") and page.is_hidden("#result")
    assert page.evaluate("document.activeElement.id") == "other"
    keep(page, "wrong")


def test_a_picture_that_is_cut_off_is_told_in_plain_words(visit):
    page = visit()
    pick(page, PNG | {"buffer": encoded(format_="TIFF")[:-900]})
    page.click("#start:enabled")
    assert trouble(page) == "This picture is damaged or not complete."


def test_what_is_too_large_is_told_before_it_is_sent_or_by_the_server(visit):
    page = visit()
    pick(page, PNG | {"buffer": bytes(300_000)})
    assert "293 KB, and up to 195 KB are taken" in trouble(page)
    assert page.is_disabled("#start")
    pick(page, PNG | {"buffer": encoded(height=130, width=130)})
    page.wait_for_selector("#trouble-text:has-text('many pixels')")
    assert page.is_disabled("#start")
    # The browser cannot look into a TIFF, so only the server knows.
    pick(page, {"name": "a.tif", "mimeType": "image/tiff", "buffer": encoded(130, 130, format_="TIFF")})
    page.click("#start:enabled")
    assert "too many pixels for one request" in trouble(page)
    assert "at most 14400" in page.text_content("#trouble-details")


def test_a_file_that_the_browser_cannot_show_is_upscaled_all_the_same(visit):
    page = visit()
    upscale(page, {"name": "a.tif", "mimeType": "image/tiff", "buffer": encoded(format_="TIFF")})
    assert "this is the result alone" in page.inner_text("#unshown")
    assert page.is_visible("#after") and page.is_hidden("#slider") and page.is_hidden("#loupe")
    assert page.get_attribute("#download", "download") == "a_x4.png"


def test_a_busy_server_is_asked_again_when_it_said(visit, served):
    _, backend = served
    page = visit()
    pick(page)
    backend.refusals, backend.wait_seconds = 1, 8
    page.click("#start:enabled")
    assert trouble(page) == "The server is busy."
    assert re.fullmatch(r"Trying again in \d s", page.inner_text("#countdown"))
    assert page.is_visible("#stop") and page.is_visible("#again")
    keep(page, "busy")
    page.wait_for_selector("#result", state="visible")
    assert page.is_hidden("#trouble") and backend.refusals == 0


def test_waiting_for_a_busy_server_can_be_stopped(visit, served):
    _, backend = served
    page = visit()
    pick(page)
    backend.refusals = 9
    page.click("#start:enabled")
    page.click("#stop")
    left = backend.refusals
    page.wait_for_timeout(1500)
    assert backend.refusals == left and page.is_hidden("#trouble") and page.is_enabled("#start")
    backend.refusals = 0


def test_waiting_is_shown_and_can_be_cancelled(visit, served):
    _, backend = served
    page = visit()
    pick(page)
    backend.is_slow = True
    page.click("#start:enabled")
    page.wait_for_selector("#phase:has-text('Upscaling')")
    assert page.inner_text("#status") == "Upscaling …"
    assert page.get_attribute("#progress", "value") is None
    keep(page, "waiting")
    page.click("#cancel")
    backend.is_slow = False
    assert page.is_hidden("#working") and page.is_enabled("#start")
    assert page.evaluate("document.activeElement.id") == "start"


def test_no_connection_is_told_and_tried_again(visit):
    page = visit()
    pick(page)
    page.context.set_offline(True)
    page.click("#start:enabled")
    assert trouble(page).startswith("You are offline.")
    page.context.set_offline(False)
    page.click("#again")
    page.wait_for_selector("#result", state="visible")


def test_a_key_is_asked_for_where_one_is_needed_and_stays_in_the_tab(visit, models):
    key, lines = new_key("anna")
    sha256 = lines.rpartition("sha256: ")[2].removesuffix("}")
    with serving(models, auth="keys", keys={"anna": {"sha256": sha256}}) as (address, _):
        page = visit(address)
        page.wait_for_selector("#access", state="visible")
        assert page.evaluate("document.activeElement.id") == "key"
        for wrong in ("wr\u00f6ng \u20ac", "wrong"):
            page.fill("#key", wrong)
            page.keyboard.press("Enter")
            assert trouble(page) == "This API key is not known here."
        keep(page, "key")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#access", state="hidden")
        upscale(page)
        assert page.evaluate("Object.values(sessionStorage)") == [key]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        page.goto("about:blank")


@pytest.mark.parametrize(("name", "options"), [("light", {}), ("dark", DARK), ("phone", PHONE)])
def test_the_page_fits_its_window_and_its_colours_the_person(visit, name, options):
    page = visit(**options)
    upscale(page)
    shot = keep(page, name)
    assert (shot[2, 2].mean() < 60) == (name == "dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_everything_can_be_done_with_keys_and_has_a_name(visit):
    page = visit()
    upscale(page)
    reached = []
    page.focus("h1 ~ nav a")
    for _ in range(12):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        page.keyboard.press("Tab")
    assert [name for name in reached if name] == [
        *("slider", "marker", "zoom", "download", "model", "scale", "format", "other", "start")
    ]
    roles = page.locator("body").aria_snapshot()
    assert (
        re.findall(r"^\s*- (?:button|slider|combobox|radio|link|textbox)(?::|$)", roles, re.MULTILINE) == []
    )


def test_nothing_but_its_own_may_run_or_load_on_the_page(served):
    import httpx2

    policy = httpx2.get(served[0]).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert httpx2.get(f"{served[0]}/page/../front.py").status_code == 404
    assert httpx2.get(f"{served[0]}/page/%2e%2e/front.py").status_code == 404
