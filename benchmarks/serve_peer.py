"""The server that a user would write: ONNX Runtime in a minimal FastAPI application, one image a request.

    python benchmarks/serve_peer.py BUNDLE PORT

It prepares and restores images with the same functions, so that its masks can be compared byte for byte. It has no
queue, no limits and no jobs.
"""

import io
import sys
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import (  # pyright: ignore[reportMissingImports]  # of the group bench, which the tests do without
    FastAPI,
    Request,
    Response,
)
from PIL import Image

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.imaging.formats.images_2d import write
from medseg_trt.imaging.images import Image as ReadImage
from medseg_trt.imaging.images import Mask
from medseg_trt.imaging.segment import segment
from medseg_trt.sessions.open import open_session


def make_app(folder: Path) -> FastAPI:
    """Return the application."""
    bundle = load_bundle(folder)
    session = open_session(bundle, "onnxruntime")
    app = FastAPI()

    @app.post("/segment")
    async def handle(request: Request) -> Response:
        pixels = np.asarray(Image.open(io.BytesIO(await request.body())))
        image = ReadImage(path=Path("image.png"), pixels=pixels.reshape(1, *pixels.shape[:2], -1))
        labels = segment(session.run, image, bundle.preprocessing, 1)
        path = Path("/dev/shm") / f"peer-{id(request)}.png"
        write(Mask.of(image, labels, bundle.classes), path)
        content = path.read_bytes()
        path.unlink()
        return Response(content, media_type="image/png")

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="warning")
