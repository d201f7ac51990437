"""What a caller may send to POST /v1/upscale, and what comes back."""

import base64
import io

import numpy as np
import PIL.Image
import pytest

from kdsr.checkpoint import load_model
from kdsr.config import UpscaleConfig
from kdsr.engine import Engine
from kdsr.manifest import Task
from kdsr.objects import ObjectUpscaler, PixelBudget
from kdsr.store import open_store
from kdsr.upscale import Upscaler
from tests.small_server import encoded, picture_of, problem


def bulk_bytes(folder, data, name, model, **options):
    """What a bulk run makes of the same file."""
    source, target = open_store(str(folder / "in")), open_store(str(folder / "out"))
    info = source.put(name, data)
    config = UpscaleConfig(input=source.uri, output=target.uri, model=model, **options)
    upscaler = Upscaler(Engine(load_model(model).model))
    objects = ObjectUpscaler(source, target, upscaler, config, PixelBudget(10**9))
    status = objects.upscale(Task("0" * 32, info.key, info.etag, info.size, target=name))
    assert status.message == ""
    return target.get(name)


def sixteen_bits():
    buffer = io.BytesIO()
    ramp = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80
    PIL.Image.fromarray(ramp).save(buffer, "PNG")
    return buffer.getvalue()


def turned():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encoded(format_="JPEG", exif=exif, quality=90)


def animation():
    frames = [PIL.Image.new("RGB", (16, 12), (shade, 90, 30)) for shade in (0, 120, 240)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)
    return buffer.getvalue()


FILES = {
    "plain.png": encoded(),
    "photo.jpg": encoded(format_="JPEG", quality=90),
    "alpha.png": encoded(mode="RGBA"),
    "grey.png": encoded(mode="L"),
    "deep.png": sixteen_bits(),
    "turned.jpg": turned(),
    "alpha.webp": encoded(format_="WEBP", mode="RGBA"),
    "moving.gif": animation(),
    "page.tif": encoded(format_="TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_an_answer_is_byte_for_byte_that_of_a_bulk_run(server, tiny_models, tmp_path, name):
    answer = server.upscale(FILES[name], query="?scale=4")
    assert answer.status_code == 200, answer.text
    assert answer.content == bulk_bytes(tmp_path, FILES[name], name, tiny_models[4])


def test_other_scales_formats_and_qualities_are_those_of_a_bulk_run_too(server, tiny_models, tmp_path):
    answer = server.upscale(FILES["plain.png"], query="?scale=2.5&format=webp&quality=40")
    options = {"scale": 2.5, "format": "webp", "encode": {"quality": 40}}
    expected = bulk_bytes(tmp_path, FILES["plain.png"], "a", tiny_models[4], **options)
    assert answer.content == expected


def test_an_answer_tells_how_it_came_to_be(server):
    answer = server.upscale(encoded(24, 32), query="?scale=2")
    assert picture_of(answer).shape == (48, 64, 3)
    found = {name: answer.headers[f"kdsr-{name}"] for name in ("model", "network", "scale", "batch-size")}
    assert found == {"model": "tiny", "network": "tiny-x2", "scale": "2", "batch-size": "1"}
    assert (answer.headers["kdsr-input-size"], answer.headers["kdsr-output-size"]) == ("32x24", "64x48")
    assert float(answer.headers["kdsr-compute-ms"]) > 0
    assert float(answer.headers["kdsr-queue-ms"]) >= 0
    assert answer.headers["etag"].startswith('"')
    assert len(answer.headers["x-request-id"]) == 32


def test_an_etag_is_another_for_whatever_changes_the_bytes(serve):
    def etag(query="?scale=2", *, width=32, **fields):
        return serve(**fields).upscale(encoded(24, width), query=query).headers["etag"]

    assert etag() == etag()
    others = [etag("?scale=4"), etag("?scale=2&format=webp"), etag(width=20), etag(tile_size=16)]
    assert len({etag(), *others}) == 5


def test_the_network_is_the_smallest_that_reaches_the_scale(server):
    expected = {1.5: "tiny-x2", 2: "tiny-x2", 3: "tiny-x4", 6: "tiny-x4"}
    answers = {scale: server.upscale(encoded(), query=f"?scale={scale}") for scale in expected}
    assert {scale: answer.headers["kdsr-network"] for scale, answer in answers.items()} == expected
    assert server.upscale(encoded()).headers["kdsr-network"] == "tiny-x4"


@pytest.mark.parametrize("name", ["model", "scale", "format", "quality"])
def test_an_option_that_is_left_empty_is_one_that_is_not_given(server, name):
    assert server.upscale(encoded(), query=f"?{name}=").content == server.upscale(encoded()).content


def test_an_image_comes_raw_as_a_form_or_in_json(server):
    data = encoded()
    raw = server.upscale(data, query="?scale=2&format=jpeg")
    form = server.client.post(
        "/v1/upscale", files={"file": ("x.png", data, "image/png")}, data={"scale": "2", "format": "jpg"}
    )
    text = base64.b64encode(data).decode()
    in_json = server.client.post("/v1/upscale", json={"image": text, "scale": 2, "format": "jpeg"})
    as_url = server.client.post(
        "/v1/upscale?scale=2", json={"image": f"data:image/png;base64,{text}", "format": "jpeg"}
    )
    assert raw.status_code == 200
    assert raw.content == form.content == in_json.content == as_url.content
    assert raw.headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/webp", "image/webp"),
        ("image/webp,image/*;q=0.8", "image/webp"),
        ("image/jpeg;q=0.5, image/png;q=0.4", "image/jpeg"),
        ("text/html, image/jpg", "image/jpeg"),
        ("image/*, image/png;q=0", "image/jpeg"),
    ],
)
def test_accept_picks_the_type(server, accept, expected):
    assert server.upscale(encoded(), query="?scale=2", Accept=accept).headers["content-type"] == expected


def test_an_option_goes_before_accept(server):
    answer = server.upscale(encoded(), query="?format=bmp", Accept="image/webp")
    assert answer.headers["content-type"] == "image/bmp"


AS_JSON = {"content_type": "application/json"}
AS_FORM = {"content_type": "multipart/form-data; boundary=b"}
AS_SHELL = {"content_type": "application/x-www-form-urlencoded"}
UNKNOWN_TYPE = (415, "unsupported-media-type")

REFUSED = {
    "a text as an image": (b"hello", "", {}, UNKNOWN_TYPE),
    "a kind that is not read": (b"8BPS" + b"\0" * 40, "", {}, UNKNOWN_TYPE),
    "half a file": (encoded()[:60], "", {}, (422, "invalid-image")),
    "nothing": (b"", "", {}, (400, "bad-request")),
    "an unknown model": (encoded(), "?model=none", {}, (422, "invalid-option")),
    "a negative scale": (encoded(), "?scale=-1", {}, (422, "invalid-option")),
    "a scale that is no number": (encoded(), "?scale=big", {}, (422, "invalid-option")),
    "a scale of nan": (encoded(), "?scale=nan", {}, (422, "invalid-option")),
    "an unknown format": (encoded(), "?format=psd", {}, (422, "invalid-option")),
    "a quality of 200": (encoded(), "?quality=200", {}, (422, "invalid-option")),
    "an unknown option": (encoded(), "?scael=2", {}, (422, "invalid-option")),
    "an option twice": (encoded(), "?scale=2&scale=3", {}, (422, "invalid-option")),
    "html only": (encoded(), "", {"Accept": "text/html"}, (406, "not-acceptable")),
    "a form of the shell": (encoded(), "", AS_SHELL, UNKNOWN_TYPE),
    "broken json": (b"{", "", AS_JSON, (400, "bad-request")),
    "deep json": (b"[" * 100_000, "", AS_JSON, (400, "bad-request")),
    "json without an image": (b"{}", "", AS_JSON, (400, "bad-request")),
    "json that is no object": (b"[1]", "", AS_JSON, (400, "bad-request")),
    "no base64": (b'{"image": "%%"}', "", AS_JSON, (400, "bad-request")),
    "a url": (b'{"url": "http://127.0.0.1/"}', "", AS_JSON, (403, "forbidden")),
    "a form without a boundary": (b"x", "", {"content_type": "multipart/form-data"}, (400, "bad-request")),
    "a form that breaks off": (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nabc',
        "",
        AS_FORM,
        (400, "bad-request"),
    ),
    "a long idempotency key": (encoded(), "", {"Idempotency_Key": "k" * 200}, (400, "bad-request")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_with_its_reason(server, case):
    data, query, headers, expected = REFUSED[case]
    assert problem(server.upscale(data, query=query, **headers)) == expected
    assert server.backend.calls == 0
