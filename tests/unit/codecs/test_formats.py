import pytest

from kdsr.codecs import HEAD_BYTES, SUFFIXES, identify
from kdsr.errors import ImageCorrupt, ImageUnsupported


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "webp"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
        (b"MM\0+", "tiff"),
    ],
)
def test_the_first_bytes_tell_the_format(head, name):
    assert identify(head.ljust(HEAD_BYTES, b"\0")) == name
    assert name in SUFFIXES.values()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"8BPS\0\1", "Photoshop"),
        (b"\xff\x0a\xfa", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
    ],
)
def test_other_kinds_of_images_are_unsupported_by_name(head, name):
    with pytest.raises(ImageUnsupported, match=name):
        identify(head)


@pytest.mark.parametrize("head", [b"{}", b"hello", b"RIFF\x10\0\0\0WAVE", b"\0\0\0\x20ftypmp42", b"\xff\xd8"])
def test_anything_else_is_not_an_image(head):
    with pytest.raises(ImageCorrupt, match="not an image"):
        identify(head)


def test_an_empty_file_is_called_empty():
    with pytest.raises(ImageCorrupt, match="empty"):
        identify(b"")
