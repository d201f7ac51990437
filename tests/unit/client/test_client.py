"""What the client gives back from a real server, and what it makes of refusals."""

import asyncio
import inspect
import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from kdsr import codecs
from kdsr.client import AsyncClient, Client
from kdsr.errors import ImageRefused, RequestError, RequestRefused
from tests.pictures import photograph
from tests.small_server import encoded


def small(seed):
    return photograph(seed, height=64, width=64)[:10, :12]


def sixteen_bits():
    return small(5).astype(np.uint16) * 257


PICTURES = {
    "rgb": small(1),
    "grey": small(1)[:, :, 0],
    "grey with an axis": small(1)[:, :, :1],
    "alpha": np.dstack([small(1), small(2)[:, :, 0]]),
    "16 bits": sixteen_bits(),
    "float": (sixteen_bits() / 65535).astype(np.float32),
}


@pytest.mark.parametrize("name", PICTURES)
def test_an_array_comes_back_as_an_array_of_its_kind(client, name):
    array = PICTURES[name]
    result = client.upscale(array, scale=2)
    assert result.shape == (20, 24, *array.shape[2:]) and result.dtype == array.dtype


def test_arrays_are_in_the_order_of_the_file(client):
    array = PICTURES["rgb"]
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "PNG")
    expected = np.asarray(PIL.Image.open(io.BytesIO(client.upscale(file.getvalue()))))
    assert np.array_equal(client.upscale(array), expected)
    assert np.array_equal(np.asarray(client.upscale(PIL.Image.fromarray(array))), expected)


@pytest.mark.parametrize(("mode", "back"), [("RGB", "RGB"), ("RGBA", "RGBA"), ("L", "L"), ("CMYK", "RGB")])
def test_a_picture_comes_back_as_a_picture(client, mode, back):
    picture = PIL.Image.new(mode, (9, 7), 100)
    result = client.upscale(picture)
    assert result.mode == back and result.size == (36, 28)


def test_bytes_come_back_as_bytes_of_the_wanted_format(client):
    assert codecs.identify(client.upscale(encoded(), format="webp", quality=50)) == "webp"
    assert codecs.identify(client.upscale(encoded(format_="JPEG"))) == "jpeg"


def test_a_path_comes_back_as_the_path_of_a_file_that_is_whole(client, tmp_path):
    source = tmp_path / "a photo.jpg"
    source.write_bytes(encoded(format_="JPEG"))
    beside = client.upscale(source, scale=2)
    named = client.upscale(str(source), output=tmp_path / "big.png")
    (tmp_path / "results").mkdir()
    inside = client.upscale(source, output=tmp_path / "results", format="webp")
    assert beside == tmp_path / "a photo_x2.jpg"
    assert inside == tmp_path / "results" / "a photo_x4.webp"
    assert codecs.identify(named.read_bytes()) == "png"
    assert codecs.probe(beside.read_bytes()).width == 64
    assert beside.read_bytes() == client.upscale(source.read_bytes(), scale=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a photo.jpg", "a photo_x2.jpg", "big.png", "results"]
    )


def test_a_client_tells_what_the_server_says_of_a_result(client):
    told = client.upscale_told(encoded(), idempotency_key="one")
    again = client.upscale_told(encoded(), idempotency_key="one")
    assert (told.model, told.scale) == ("tiny", 4)
    assert (told.input_size, told.output_size) == ((32, 24), (128, 96))
    assert told.compute_seconds > 0 and told.request_id
    assert again.image == told.image and again.was_replayed and not told.was_replayed


def test_what_is_served_is_told(client):
    offer = client.models()
    assert [(model.name, model.scales) for model in offer.models] == [("tiny", (2, 4))]
    assert offer.limits["max_pixels"] == 10_000


@pytest.mark.parametrize(
    ("picture", "wanted", "error", "status", "kind"),
    [
        (b"no image at all", {}, ImageRefused, 415, "unsupported-media-type"),
        (encoded()[:200], {}, ImageRefused, 422, "invalid-image"),
        (encoded(height=101, width=100), {}, ImageRefused, 413, "image-too-large"),
        (bytes(100_001), {}, ImageRefused, 413, "body-too-large"),
        (encoded(), {"model": "unknown"}, RequestRefused, 422, "invalid-option"),
    ],
)
def test_a_refusal_is_an_error_of_its_kind(client, picture, wanted, error, status, kind):
    with pytest.raises(error, match=f"POST v1/upscale of .*: {status} ") as caught:
        client.upscale(picture, **wanted)
    assert (caught.value.status, caught.value.kind) == (status, kind)
    assert caught.value.request_id


def test_no_key_is_an_error_and_no_error_shows_the_key(served):
    address, key = served
    with Client(address) as stranger, pytest.raises(RequestRefused, match="401 No valid API key"):
        stranger.models()
    with Client(address, api_key=key) as friend, pytest.raises(RequestRefused) as caught:
        friend.upscale(encoded(), model="unknown")
    assert key not in str(caught.value) + repr(friend)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda client: client.upscale(Path("not there.png")), "expected the path of an image file"),
        (lambda client: client.upscale(7), "found int"),
        (lambda client: client.upscale(np.zeros((2, 2, 2), np.uint8)), r"found \(2, 2, 2\)"),
        (lambda client: client.upscale(np.zeros((2, 2, 3))), "found float64"),
        (lambda client: client.upscale(np.full((2, 2), np.nan, np.float32)), "NaN"),
        (lambda client: client.upscale(PIL.Image.new("F", (2, 2))), "mode F"),
        (
            lambda client: client.upscale(PIL.Image.new("L", (2, 2)), format="jpeg"),
            "for paths and bytes only",
        ),
        (lambda client: client.upscale(b"x", output="a.png"), "for a path only"),
        (lambda client: client.upscale(b"x", scal=2), "no option scal"),
        (lambda client: client.job("../models"), "expected the id of a job"),
        (lambda _: Client("127.0.0.1:8000"), "expected the url of a server"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_sent(client, call, text):
    with pytest.raises(RequestError, match=text):
        call(client)


@pytest.mark.parametrize("key", ["hush\n", "hush hush", "h\u00fcsh", ""])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(kind, key):
    with pytest.raises(RequestError, match="api_key") as refused:
        kind("http://127.0.0.1:1", api_key=key)
    assert "hush" not in str(refused.value)


def test_a_refused_file_leaves_nothing_behind(client, tmp_path):
    source = tmp_path / "a.png"
    source.write_bytes(b"no image at all")
    with pytest.raises(ImageRefused, match="a.png"):
        client.upscale(source)
    assert list(tmp_path.iterdir()) == [source]


def test_the_async_client_does_the_same(client, make_async, tmp_path):
    source = tmp_path / "a.png"
    source.write_bytes(encoded())

    async def several():
        async with make_async() as one:
            offer, array, path = await asyncio.gather(
                one.models(), one.upscale(PICTURES["rgb"]), one.upscale(source, scale=2)
            )
            with pytest.raises(ImageRefused):
                await one.upscale(b"no image at all")
            return offer, array, path

    offer, array, path = asyncio.run(several())
    assert offer == client.models()
    assert np.array_equal(array, client.upscale(PICTURES["rgb"]))
    assert path.read_bytes() == client.upscale(source.read_bytes(), scale=2)


def test_an_async_call_that_is_given_up_leaves_nothing_behind(scripted, tmp_path):
    source = tmp_path / "a.png"
    source.write_bytes(encoded())
    server = scripted(b"")  # Closes without a word, so that the client waits for another try.

    async def give_up():
        async with AsyncClient(server.address) as one:
            task = asyncio.create_task(one.upscale(source))
            while not server.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(give_up())
    assert list(tmp_path.iterdir()) == [source]


def test_both_clients_can_do_the_same():
    def doing(kind):
        methods = {name: member for name, member in vars(kind).items() if name[0] != "_"}
        return {name: list(inspect.signature(member).parameters) for name, member in methods.items()}

    assert doing(Client) == doing(AsyncClient)


def test_the_example_of_the_page_works(served, tmp_path, monkeypatch):
    address, key = served
    page = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    example = example.replace("http://127.0.0.1:8000", address).replace('"KEY"', repr(key))
    (tmp_path / "photo.jpg").write_bytes(encoded(height=15, width=20, format_="JPEG"))
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(example, "docs/serving.md", "exec"), found)
    assert found["path"] == Path("photo_x4.jpg") and codecs.identify(found["data"]) == "webp"
    assert codecs.probe(Path("photo.png").read_bytes()).width == 80
