"""GET /: one page to try the server. Its files lie in `page/` as they are sent; nothing is from elsewhere."""

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    # Pictures that the browser itself made of files (blob:), and nothing that is not from here.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Let `app` answer GET / with the page and have its files below /page."""
    text = (FOLDER / "index.html").read_text(encoding="utf-8")

    async def page(_: Request) -> Response:
        return HTMLResponse(text, headers=HEADERS)

    app.add_api_route("/", page, methods=["GET"], include_in_schema=False, response_model=None)
    app.mount("/page", StaticFiles(directory=FOLDER))
