"""Jobs on a real cluster: submitted from the checkout with a token, trained on two nodes, all that is kept on S3."""

import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_cluster import OwnCluster, own_cluster
from s3_server import ENVIRONMENT, Bucket, s3_server
from shop_log import write_log

from seqray.bundle import Bundle
from seqray.cache import Cache
from train.runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bucket(module_port: int) -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        with s3_server(module_port) as bucket:
            yield bucket


@pytest.fixture(scope="module")
def cluster(bucket: Bucket) -> Iterator[OwnCluster]:
    with own_cluster(ENVIRONMENT) as cluster:
        yield cluster


def submit(cluster: OwnCluster, *command: str) -> list[str]:
    return ["job", "submit", "--address", cluster.address, "--working-dir", ".", "--", *command]


def watch_metrics(cluster: OwnCluster, found: set[str], over: threading.Event) -> None:
    """Collects the names and labels of our metrics while a job runs."""
    while not over.wait(1):
        for url in cluster.metrics:
            with urllib.request.urlopen(url, timeout=20) as answer:
                for line in answer.read().decode().splitlines():
                    if line.startswith("ray_seqray_"):
                        found.add(line.split("{")[0] + " worker " + re.findall('worker="([^"]*)"', line)[0])


def test_a_submitted_job_trains_on_two_nodes_and_leaves_its_bundle_on_s3(
    cluster: OwnCluster, bucket: Bucket, tmp_path: Path
) -> None:
    log = bucket.put_file("log.parquet", write_log(tmp_path, num_users=6000))
    found: set[str] = set()
    over = threading.Event()
    watcher = threading.Thread(target=watch_metrics, args=(cluster, found, over))
    watcher.start()
    done = cluster.ray(
        *submit(cluster, "python", "-m", "train", "configs/demo.yaml"),
        "name=job", f"data.path={log}", "data.items=null", f"output={bucket.uri('out')}", "cluster.address=null",
        "train.num_workers=2", "train.epochs=20", "train.patience=20", "tracking.mode=disabled",
    )  # fmt: skip
    over.set()
    watcher.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers on cpu" in done.stdout
    assert "tokens/s" in done.stdout
    assert "succeeded" in done.stdout
    [run_id] = {key.split("/")[3] for key in bucket.keys("out/runs/job")}
    assert Run.load(bucket.uri(f"out/runs/job/{run_id}")).status == "finished"
    assert f"serve.bundle={bucket.uri('out/bundles/job/' + run_id)}" in done.stdout.replace("'", "")
    bundle = Bundle.load(bucket.uri(f"out/bundles/job/{run_id}"), cache=Cache(tmp_path))
    assert bundle.metrics["test/ndcg@10"] > 2 * bundle.metrics["baselines"]["popularity"]["test/ndcg@10"]
    names = ("ray_seqray_tokens_per_s", "ray_seqray_time_share")
    assert found == {f"{name} worker {rank}" for name in names for rank in (0, 1)}


def test_a_job_without_the_token_is_refused(cluster: OwnCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    for change in ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, {"RAY_AUTH_MODE": "disabled"}):
        stranger = OwnCluster(cluster.address, {**cluster.environment, **change}, ())
        done = stranger.ray(*submit(cluster, "python", "-c", "print('stranger')"))
        assert done.returncode != 0
        assert "stranger" not in done.stdout.replace("print('stranger')", "")


def test_a_mistake_in_the_config_fails_the_job_with_one_line(cluster: OwnCluster) -> None:
    done = cluster.ray(*submit(cluster, "python", "-m", "train", "configs/demo.yaml", "train.lr=1"))
    assert done.returncode == 1
    assert "nearest: train.learning_rate" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_state_of_jobs_is_told(cluster: OwnCluster) -> None:
    done = cluster.ray("job", "list", "--address", cluster.address)
    assert "SUCCEEDED" in done.stdout
    assert "FAILED" in done.stdout
