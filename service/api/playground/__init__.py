"""The playground: `GET /` as a page to try the detector by hand, with its few files; or as JSON, for programs.

The page needs no build step and no other host. It asks `/model` and `/detect` as any client does.
"""

import hashlib
from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from model.pretrained import EXAMPLE_PICTURE
from service.api.replies import qualities

INDEX = "/"
FILES = "/playground"
LINKS = {
    "detect": "detect",
    "detect_batch": "detect/batch",
    "model": "model",
    "healthz": "healthz",
    "readyz": "readyz",
    "metrics": "metrics",
}
"""Links relative to `/`, which work below a proxy's path prefix too."""
DOCS_LINKS = {"docs": "docs", "openapi": "openapi.json"}
FOLDER = Path(__file__).parent
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
PAGE_HEADERS = HEADERS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
}


def is_playground(method: str, path: str) -> bool:
    """Tell whether the request asks for the page or one of its files, which need no key."""
    return method in ("GET", "HEAD") and (path == INDEX or path.startswith(f"{FILES}/"))


def routes(*, with_page: bool) -> list[BaseRoute]:
    """Make the routes of `GET /` and the page's files; without the page, `GET /` is JSON for all clients."""
    index = Route(INDEX, partial(_index, page=(FOLDER / "index.html").read_bytes() if with_page else None))
    if not with_page:
        return [index]
    paths = [FOLDER / "playground.js", FOLDER / "playground.css", FOLDER / "favicon.svg", EXAMPLE_PICTURE]
    return [index, Mount(FILES, routes=[_file_route(path) for path in paths])]


async def _index(request: Request, *, page: bytes | None) -> Response:
    if page is not None and not _prefers_json(request.headers.get("accept", "")):
        return Response(page, media_type="text/html", headers=PAGE_HEADERS)
    links = LINKS | (DOCS_LINKS if page is not None else {})
    return JSONResponse({"name": "retinaserve", "links": links}, headers=HEADERS | {"Vary": "Accept"})


def _prefers_json(accept: str) -> bool:
    """Tell whether this Accept header names JSON and ranks it above HTML; `*/*` gets the page."""
    quality = qualities(accept)
    html = next((quality[name] for name in ("text/html", "text/*", "*/*") if name in quality), 0.0)
    json = quality.get("application/json", 0.0)
    return json > html or (json == html > 0 and "text/html" not in quality)


def _file_route(path: Path) -> Route:
    body = path.read_bytes()
    headers = HEADERS | {"ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"'}

    async def file(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=MEDIA_TYPES[path.suffix], headers=headers)

    return Route(f"/{path.name}", file)
