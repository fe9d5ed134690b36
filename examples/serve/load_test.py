"""Throughput and latency of the service under concurrency, for one file after the other, and whether its answers are right.

    python examples/serve/load_test.py dense.onnx int8.onnx small.onnx --concurrency 8 --seconds 10

Each file gets a server of its own. Clients share this machine with it, and send the embedded sample of Fashion-MNIST as PNG.
The answers are compared with those of the same file without HTTP.
"""

import argparse
import asyncio
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image
from service import Model

HEADERS = {"Content-Type": "image/png"}


def sample(n: int) -> list[bytes]:
    """Images of the embedded sample as PNG."""
    import vitoats

    arrays = np.load(Path(vitoats.__file__).parent / "data" / "fashion_mnist_sample.npz")
    images = next(arrays[name] for name in arrays.files if arrays[name].ndim == 3)[:n]
    encoded = [io.BytesIO() for _ in images]
    for image, file in zip(images, encoded, strict=True):
        Image.fromarray(image).save(file, "PNG")
    return [file.getvalue() for file in encoded]


@contextmanager
def served(file: str) -> Iterator[str]:
    """Starts the service on a free port; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("service.py")
    server = subprocess.Popen([sys.executable, str(script), file, "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit(f"the service for {file} has ended")
            try:
                httpx2.get(f"{address}/health").raise_for_status()
                break
            except httpx2.TransportError:
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


async def load(address: str, images: list[bytes], concurrency: int, seconds: float) -> list[float]:
    """The latencies in seconds of all requests that clients, each with one at a time, got answered within some seconds."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def client(first: int) -> None:
        async with httpx2.AsyncClient(base_url=address, timeout=60) as http:
            i = first
            while (start := time.perf_counter()) < end:
                (await http.post("/predict", content=images[i % len(images)], headers=HEADERS)).raise_for_status()
                latencies.append(time.perf_counter() - start)
                i += concurrency

    await asyncio.gather(*(client(i) for i in range(concurrency)))
    return latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="exported .onnx files")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="clients, each with one request at a time")
    parser.add_argument("--seconds", type=float, default=10, metavar="N", help="for each file")
    args = parser.parse_args()
    images = sample(64)
    print("| file | images/s | p50 ms | p95 ms | p99 ms | largest difference from offline |\n|---|---|---|---|---|---|")
    for file in args.files:
        model = Model(file)
        with served(file) as address:
            answers = [httpx2.post(f"{address}/predict", content=image, headers=HEADERS).json()["outputs"] for image in images]
            difference = max(float(np.abs(model(i) - np.array(a)).max()) for i, a in zip(images, answers, strict=True))
            latencies = np.array(asyncio.run(load(address, images, args.concurrency, args.seconds)))
        tail = " | ".join(f"{value:.1f}" for value in 1000 * np.percentile(latencies, [50, 95, 99]))
        print(f"| {Path(file).name} | {len(latencies) / args.seconds:.0f} | {tail} | {difference:.0e} |", flush=True)


if __name__ == "__main__":
    main()
