"""Places and models as people name them, made absolute. Loads neither torch nor ray."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def absolute_uri(uri: str) -> str:
    """`uri` with its scheme; a plain or relative path becomes `file://` and an absolute path.

    The rest is taken literally: nothing is percent-decoded. Raises ValueError for an unknown scheme and for
    an S3 uri without a plain bucket name; what may be a secret is not repeated.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "file", uri
    if scheme == "s3":
        bucket = rest.partition("/")[0]
        # Never show what stands here: with ":" or "@" it may be a secret key.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
            raise ValueError("expected s3://BUCKET/PREFIX; credentials come from AWS's standard chain")
        return f"s3://{rest}"
    if scheme == "file":
        return f"file://{Path(rest).expanduser().absolute()}"
    raise ValueError(f"unknown scheme {scheme}://; use file://, s3:// or a plain path")


def model_reference(reference: str) -> str:
    """The name of a bundled model as it stands, anything that looks like a place as an absolute uri."""
    looks_like_place = "/" in reference or Path(reference).suffix in {".pt", ".pth", ".safetensors"}
    return absolute_uri(reference) if looks_like_place else reference


def endpoint_url(url: str) -> str:
    """`url` when it is a server's address without credentials. Raises ValueError otherwise."""
    scheme, _, rest = url.partition("://")
    if scheme not in {"http", "https"} or not rest:
        raise ValueError("expected http://HOST:PORT or https://HOST")
    if "@" in rest:
        raise ValueError("must not carry credentials; they come from AWS's standard chain")
    return url


Uri = Annotated[str, AfterValidator(absolute_uri)]
EndpointUrl = Annotated[str, AfterValidator(endpoint_url)]
ModelReference = Annotated[str, AfterValidator(model_reference)]
