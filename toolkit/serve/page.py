"""The page at ``/``: plain files of the package, and the sample that it offers."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from medseg_trt.serve.sample import sample_png
from medseg_trt.serve.state import ServerState

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def routes(state: ServerState) -> list[Route]:
    """Return the routes of the page."""

    def file_route(path: str, name: str, media_type: str) -> Route:
        content = (files("medseg_trt.serve") / name).read_bytes()

        async def send(_request: Request) -> Response:
            return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

        return Route(path, send)

    async def sample(request: Request) -> Response:
        model = state.models.get(request.query_params.get("model", "")) or next(iter(state.models.values()))
        return Response(sample_png(model.bundle.preprocessing.image_size), media_type="image/png")

    return [*(file_route(path, *file) for path, file in FILES.items()), Route("/sample.png", sample)]
