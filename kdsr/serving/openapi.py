"""What /openapi.json says of each path beyond what FastAPI sees by itself."""

from collections.abc import Mapping
from typing import Any

from kdsr.serving.contract import MEDIA_TYPES, Options
from kdsr.serving.problems import KINDS, MEDIA_TYPE

SUMMARIES = {
    "models": (
        "The models that are served, with their cards and the limits of a request",
        "application/json",
    ),
    "healthz": ("Whether this process lives", "text/plain"),
    "readyz": ("Whether models are loaded and requests can be answered", "text/plain"),
    "metrics": ("Numbers for Prometheus", "text/plain"),
}

PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string", "enum": [f"urn:kdsr:problem:{kind}" for kind in KINDS]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
    },
}
"""RFC 9457."""

ANSWER_HEADERS = {
    "ETag": "Of input, network, options and tile size; for If-None-Match.",
    "Kdsr-Model": "Name of the model.",
    "Kdsr-Network": "Name of its network that did it.",
    "Kdsr-Scale": "Of the result.",
    "Kdsr-Input-Size": "WIDTHxHEIGHT.",
    "Kdsr-Output-Size": "WIDTHxHEIGHT.",
    "Kdsr-Queue-Ms": "Milliseconds until the first tile was begun.",
    "Kdsr-Compute-Ms": "Milliseconds of the network, the times of all tiles added up.",
    "Kdsr-Batch-Size": "Most tiles, of any requests, that went through the network together.",
    "Server-Timing": "The same with decoding and encoding.",
    "Idempotency-Replayed": "true when the answer is that of an earlier request with the same key.",
    "X-Request-Id": "As given, or new.",
}
"""Of an upscaled image."""
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""Both ways in which an API key may come."""


def require_keys(document: dict[str, Any]) -> None:
    """Say in the OpenAPI document that what may answer 401 needs a key."""
    document.setdefault("components", {})["securitySchemes"] = KEYS
    for operations in document["paths"].values():
        for operation in operations.values():
            if "401" in operation["responses"]:
                operation["security"] = [{name: []} for name in KEYS]


def _headers(names: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in names.items()}


def problems(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """The answers of these kinds, by status."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        status, title = KINDS[kind]
        earlier = found.get(status, {}).get("description")
        found[status] = {
            "description": f"{earlier}; {title}" if earlier else title,
            "content": {MEDIA_TYPE: {"schema": PROBLEM_SCHEMA}},
        }
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return found


def described(name: str) -> dict[str, Any]:
    """Arguments of a GET route."""
    summary, media_type = SUMMARIES[name]
    schema = {"type": "object"} if media_type == "application/json" else {"type": "string"}
    refusals = {
        "models": problems("unauthorized", "loading"),
        "healthz": {},
        "readyz": problems("loading"),
        "metrics": problems("unauthorized"),
    }[name]
    answer = {200: {"description": "As it says", "content": {media_type: {"schema": schema}}}}
    return {"name": name, "summary": summary, "responses": answer | refusals}


def _parameters() -> list[dict[str, Any]]:
    properties = Options.model_json_schema()["properties"]
    query = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": " ".join(schema.get("description", "").split()),
            "schema": next(part for part in schema["anyOf"] if part.get("type") != "null"),
        }
        for name, schema in properties.items()
    ]
    headers = [
        ("Accept", "Types of result that are welcome; the option format goes first."),
        ("Idempotency-Key", "The same request under the same key is done once."),
        ("If-None-Match", "ETags of results that are there already; the answer is 412 for those."),
        ("X-Request-Id", "Goes into the log and comes back."),
    ]
    return query + [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in headers
        if name != "Accept"  # OpenAPI leaves it to the types of the answer.
    ]


def _body() -> dict[str, Any]:
    options = Options.model_json_schema()["properties"]
    image = {"type": "string", "format": "binary"}
    return {
        "required": True,
        "content": {
            "image/*": {"schema": image},
            "application/octet-stream": {"schema": image},
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {"file": image} | options}
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "contentEncoding": "base64"},
                        "url": {"type": "string", "description": "Instead of image, where it is allowed"},
                    }
                    | options,
                }
            },
        },
    }


_IMAGES = {name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES.values()}

UPSCALE: dict[str, Any] = {
    "name": "upscale",
    "summary": "Upscale one image; the answer is the image",
    "openapi_extra": {"parameters": _parameters(), "requestBody": _body()},
    "responses": {
        200: {
            "description": "The upscaled image",
            "headers": _headers(ANSWER_HEADERS),
            "content": _IMAGES,
        }
    }
    | problems(
        *(
            "bad-request",
            "unauthorized",
            "forbidden",
            "not-acceptable",
            "slow-body",
            "conflict",
            "same-result",
        ),
        *("body-too-large", "image-too-large", "unsupported-media-type", "invalid-option", "invalid-image"),
        *("reused-key", "busy", "quota", "loading", "worker-lost", "deadline"),
    ),
}


def _job(name: str, summary: str, status: int, *kinds: str, **extra: Any) -> dict[str, Any]:
    path = [] if name == "create" else [_ID]
    answer = {
        "description": extra.pop("answer", "The job"),
        "headers": _headers(extra.pop("headers", {})),
        "content": extra.pop("content", {"application/json": {"schema": JOB_SCHEMA}}),
    }
    others = extra.pop("others", {})
    return {
        "name": f"job_{name}",
        "status_code": status,
        "summary": summary,
        "openapi_extra": {"parameters": path + extra.pop("parameters", [])} | extra,
        "responses": {status: answer} | others | problems("unauthorized", "store-unavailable", *kinds),
    }


_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "As POST /v1/jobs gave it.",
    "schema": {"type": "string"},
}
JOB_SCHEMA = {
    "type": "object",
    "required": ["id", "state", "created", "listed", "done", "failed"],
    "properties": {
        "id": {"type": "string"},
        "state": {"type": "string", "enum": ["queued", "running", "done", "failed", "cancelled"]},
        "created": {"type": "string"},
        "listed": {"type": "integer"},
        "done": {"type": "integer"},
        "failed": {"type": "integer"},
        "output_megapixels": {"type": "number"},
        "message": {"type": "string"},
        "failures": {"type": "object"},
        "result": {"type": "string"},
    },
}
_JOB_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["input", "output"],
                "properties": {
                    "input": {"type": "string", "description": "Folder or prefix of images"},
                    "output": {"type": "string", "description": "Folder or prefix of results"},
                    "include": {"type": "array", "items": {"type": "string"}},
                }
                | Options.model_json_schema()["properties"],
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
JOBS: dict[str, dict[str, Any]] = {
    "create": _job(
        "create",
        "Upscale a prefix of images, or one large image, in the background",
        202,
        *("bad-request", "forbidden", "slow-body", "body-too-large", "unsupported-media-type"),
        *("image-too-large", "invalid-image", "invalid-option", "reused-key", "busy", "quota", "loading"),
        parameters=_parameters(),
        requestBody=_JOB_BODY,
        headers={"Location": "Where to ask for it.", "Retry-After": "Seconds until it is worth asking."},
    ),
    "show": _job("show", "How far a job is", 200, "not-found"),
    "cancel": _job("cancel", "Stop a job; what is done stays", 200, "not-found", "conflict"),
    "result": _job(
        "result",
        "The file that an uploaded image became",
        200,
        *("not-found", "conflict"),
        answer="The upscaled image",
        content=_IMAGES,
        headers={"ETag": "Of the file, for If-None-Match."},
        others={304: {"description": "If-None-Match names the file"}},
    ),
}
