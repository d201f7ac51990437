"""GET /docs: the contract for people, made from the OpenAPI document. One page, no scripts, no other host."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #8884; }
h2 { margin-top: 2.5rem; }
"""


def docs_page(openapi: Mapping[str, Any]) -> str:
    """The whole page."""
    info = openapi["info"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        "<p>For programs: <a href='openapi.json'>openapi.json</a>. Errors are JSON as RFC 9457 has it.</p>",
    ]
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts += _operation(path, method, operation)
    return "\n".join(parts)


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.</p>"
    body = operation.get("requestBody", {}).get("content", {})
    if body:
        yield f"<p>Body: {', '.join(f'<code>{escape(name)}</code>' for name in body)}.</p>"
    parameters = [
        (parameter["name"], parameter["in"], parameter.get("description", ""))
        for parameter in operation.get("parameters", [])
    ]
    if parameters:
        yield from _table(("parameter", "in", ""), parameters)
    if "security" in operation:
        ways = "<code>Authorization: Bearer KEY</code> or <code>X-API-Key: KEY</code>"
        yield f"<p>Needs an API key: {ways}.</p>"
    answers = [
        (status, answer["description"], ", ".join(answer.get("content", {})))
        for status, answer in operation["responses"].items()
    ]
    yield from _table(("status", "", "type"), answers)
    headers = [
        (name, header.get("description", ""))
        for status, answer in operation["responses"].items()
        for name, header in answer.get("headers", {}).items()
        if status.startswith("2")
    ]
    if headers:
        yield from _table(("header of the answer", ""), headers)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>"
    yield "</table>"
