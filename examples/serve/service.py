"""Serves an exported classifier or backbone over HTTP: POST an image, get its outputs.

    vitoats export_onnx runs/vitb14 -o vitb14.onnx
    python examples/serve/service.py vitb14.onnx --port 8000
    curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict

Needs neither torch nor timm. An image is decoded, resized and run on one thread; as many images as there are cores take turns.
"""

import argparse
import asyncio
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image

from vitoats.data.pixels import rgb
from vitoats.runtime import metadata, session

MAX_BYTES = 10_000_000  # of a request
MAX_PIXELS = 50_000_000  # of its image, once decoded
MAX_REQUESTS = 64  # at the same time; others get status 503
TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp")


class Model:
    """An exported file and its preprocessing, in NumPy and Pillow."""

    def __init__(self, path: str):
        self.session = session(path, threads=1)
        described = metadata(self.session)
        self.classes: list[str] | None = described.get("classes")
        own = described["preprocessing"]
        if own["crop_mode"] != "center" or not isinstance(own["img_size"], int) or len(own["mean"]) != 3:
            raise SystemExit("this example takes square RGB images with a centre crop: extend Model.prepare for others")
        self.size, self.resized = own["img_size"], int(own["img_size"] / own["crop_pct"])
        self.resample = Image.Resampling[own["interpolation"].upper()]
        self.mean, self.std = (np.array(own[name], np.float32)[:, None, None] for name in ("mean", "std"))

    def prepare(self, image: Image.Image) -> np.ndarray:
        """The model's input [1, 3, size, size], as timm's evaluation makes it."""
        image = rgb(image)
        short = min(image.size)
        width, height = (int(self.resized * side / short) for side in image.size)
        image = image.resize((width, height), self.resample)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
        return ((pixels - self.mean) / self.std)[None]

    def __call__(self, body: bytes) -> np.ndarray:
        """The outputs for an encoded image.

        Raises:
            ValueError: it is no image, or one with too many pixels.
        """
        try:
            with Image.open(io.BytesIO(body)) as image:  # reads the header only
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"the image has more than {MAX_PIXELS} pixels")
                found = self.prepare(image)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError("the body is no image that Pillow reads") from error
        return self.session.run(None, {self.session.get_inputs()[0].name: found})[0][0]


async def bounded_body(request: Request) -> bytes:
    """The body of a request; it is not read on when it gets too long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BYTES:
            raise HTTPException(413, f"send at most {MAX_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def create_app(model: Model) -> FastAPI:
    """The service: POST /predict, GET /health."""
    app = FastAPI(title="vitoats")
    pool = ThreadPoolExecutor(os.cpu_count())

    @app.get("/health")
    async def health() -> dict:
        return {"native_nodes": len(model.session.native_nodes)}

    @app.post("/predict")
    async def predict(request: Request) -> dict:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in TYPES:
            raise HTTPException(415, f"send an image as the body, with one of these types: {', '.join(TYPES)}")
        if not (body := await bounded_body(request)):
            raise HTTPException(400, "the body is empty: send an image")
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(pool, model, body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        answer: dict = {"outputs": outputs.tolist()}
        return answer | ({"class": model.classes[int(outputs.argmax())]} if model.classes else {})

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="an exported .onnx file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    app = create_app(Model(args.model))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", limit_concurrency=MAX_REQUESTS)


if __name__ == "__main__":
    main()
