"""What serve_load.py puts load on, each started as a process of its own.

A made-up bundle, a bare FastAPI app around the same Recommender, and a Ray Serve deployment that does nothing, with Ray
Serve's settings for throughput alone or in the environment of `python -m serve`:

    python -m benchmarks.serve_targets bundle FOLDER --items 100000
    python -m benchmarks.serve_targets fastapi BUNDLE --port 8001
    python -m benchmarks.serve_targets nothing --port 8002
    python -m benchmarks.serve_targets nothing-tuned --port 8003
"""

import argparse
import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import torch

from seqray.bundle import Bundle
from seqray.catalogue import Catalogue
from seqray.config import Config
from seqray.models.protocol import build_model
from seqray.recommender import Query, Recommender

READY = "ready"
HISTORY = 50
K = 20


def make_bundle(folder: Path, num_items: int, seed: int = 0) -> Bundle:
    """A SASRec (2 blocks, max_length 50) with random weights over made-up items: speed does not depend on training.

    Weights of another seed give other answers, and scores that are far apart.
    """
    config = Config.parse(
        {
            "name": "load", "data": {"path": "log.csv"},
            "model": {"type": "sasrec", "hidden_dim": 64, "num_blocks": 2, "max_length": HISTORY},
        }
    )  # fmt: skip
    rows = range(1, num_items + 1)
    items = pa.table(
        {
            "item_id": [f"item-{row}" for row in rows],
            "train_events": pa.array([num_items - row for row in rows], pa.int64()),
            "title": [f"Item number {row}" for row in rows],
            "category": [f"category {row % 50}" for row in rows],
            "price": [row % 997 / 10 for row in rows],
        }
    )
    torch.manual_seed(seed)
    state = build_model(config.model, Catalogue(num_items, items)).state_dict()
    state = {name: 20 * tensor if name.startswith("items.") else tensor for name, tensor in state.items()}
    return Bundle.save(
        folder, config=config, state=state, items=items, metrics={"baselines": {}}, data_fingerprint="made up",
        run_id=f"random-{seed}",
    )  # fmt: skip


def write_bodies(path: Path, num_items: int, filtered: bool = False) -> None:
    """1,000 requests of random histories, a line each."""
    chance = random.Random(0)
    with path.open("w") as file:
        for _ in range(1000):
            history = [f"item-{chance.randint(1, num_items)}" for _ in range(HISTORY)]
            body: dict[str, Any] = {"history": history, "k": K}
            if filtered:
                body["filter"] = {"field": "category", "in": [f"category {chance.randint(0, 4)}"]}
            file.write(json.dumps(body, separators=(",", ":")) + "\n")


def serve_fastapi(bundle: str, port: int) -> None:
    """The app that one writes in an afternoon: FastAPI, pydantic, uvicorn, one Recommender, a request a call."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel, Field

    recommender = Recommender(Bundle.load(bundle), num_threads=1)
    app = FastAPI()

    class Ask(BaseModel):
        history: list[str]
        k: Annotated[int, Field(ge=1, le=500)] = 20

    @app.post("/v1/recommend")
    def recommend(ask: Ask) -> dict[str, Any]:
        [found] = recommender.recommend([Query(tuple(ask.history), ask.k)])
        return {"items": [{"item_id": item.item_id, "score": item.score} for item in found.items]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def serve_nothing(port: int, tuned: bool) -> None:
    """A deployment of Ray Serve that reads the body and answers always the same.

    With HAProxy and Ray Serve's setting for throughput, access log off; tuned: as `python -m serve` sets Ray Serve up.
    """
    from starlette.requests import Request
    from starlette.responses import Response

    from serve.cluster import connect, start_local
    from serve.deploy import LOGGING, stop_cluster
    from serve.profile import haproxy_folder, haproxy_places

    if tuned:
        connect(
            Config.parse(
                {"name": "n", "data": {"path": "log.csv"}, "cluster": {"address": "local"}, "serve": {"port": port}}
            )
        )
    else:
        os.environ.update(
            haproxy_places(haproxy_folder()), RAY_SERVE_ENABLE_HA_PROXY="1", RAY_SERVE_THROUGHPUT_OPTIMIZED="1"
        )
        start_local(2)
    logging_config = LOGGING if tuned else {"enable_access_log": False}
    import ray.serve

    answer = json.dumps({"items": [{"item_id": "item-1", "rank": 1, "score": 1.5, "source": "model"}] * K}).encode()

    class Nothing:
        async def __call__(self, request: Request) -> Response:
            await request.body()
            return Response(answer, media_type="application/json")

    ray.serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    deployment = ray.serve.deployment(max_ongoing_requests=64, logging_config=logging_config)(Nothing)
    ray.serve.run(deployment.bind(), name="nothing", route_prefix="/")
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    print(READY, flush=True)
    told.wait()
    stop_cluster(True)


def main() -> None:
    """One of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=["bundle", "fastapi", "nothing", "nothing-tuned"])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    if arguments.what == "bundle":
        make_bundle(Path(arguments.folder), arguments.items)
    elif arguments.what == "fastapi":
        serve_fastapi(arguments.folder, arguments.port)
    else:
        serve_nothing(arguments.port, tuned=arguments.what == "nothing-tuned")


if __name__ == "__main__":
    main()
