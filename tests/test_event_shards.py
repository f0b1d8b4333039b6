"""A store in shards: the same events as a whole one, bit for bit, through a cache that holds a part of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from s3_server import ENVIRONMENT, Bucket, s3_server
from shop_log import shop_config, write_log
from struck import job_of, progress_in, run_workers

from seqray.bundle import Bundle
from seqray.config import Config
from seqray.errors import ConfigError, DataError
from seqray.event_shards import LANES, events_location, lane_order, read_shards
from seqray.folder import Folder
from seqray.samples import Step, TrainingSamples
from seqray.sequences import SequenceStore
from train.baseline_rows import baseline_rows
from train.fit import Trial, fit
from train.prepare import ensure_store

SHARDS, HELD = 24, 18


@pytest.fixture(scope="module")
def bucket(module_port: int) -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        with s3_server(module_port) as bucket:
            yield bucket


@pytest.fixture
def whole(tmp_path: Path) -> Config:
    write_log(tmp_path, num_users=240)
    return shop_config(tmp_path, name="whole", train={"batch_size": 32}, evaluate={"batch_size": 64})


def sharded(config: Config, name: str, **changes: Any) -> Config:
    return config.override({"name": name, "data.store": "", "data.store_shards": SHARDS, **changes})


def remote(config: Config, bucket: Bucket, name: str, folder: Path) -> Config:
    """In shards on S3, of which the node holds HELD at a time."""
    largest = max(shard.bytes for shard in read_shards(ensure_store(sharded(config, "parts")).folder))
    cache = {"cluster.cache_folder": str(folder / "cache"), "cluster.cache_shards_gib": largest * HELD / 2**30}
    return sharded(config, name, **{"output": bucket.uri("out"), **cache})


def shards_held(folder: Path) -> list[Path]:
    return list(folder.glob("cache/shards-*/*.arrow"))


def tensors(step: Step) -> dict[str, Any]:
    batch, targets = step.batch, step.targets
    found = {**vars(batch), **{f"target_{key}": value for key, value in vars(targets).items()}}
    return found | {"weight": step.weight, "targets": step.global_targets, "tokens": step.global_tokens}


def assert_same_step(one: Step, other: Step) -> None:
    for (name, left), right in zip(tensors(one).items(), tensors(other).values(), strict=True):
        same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        assert same, name


def test_every_batch_of_the_shards_is_that_of_the_whole_store(whole: Config, bucket: Bucket, tmp_path: Path) -> None:
    store, parts = ensure_store(whole), ensure_store(remote(whole, bucket, "remote", tmp_path))
    for windows in ("last", "all"):
        one, other = (TrainingSamples(s, 4, 7, windows=windows) for s in (store, parts))  # type: ignore[arg-type]
        for epoch in range(2):
            order = other.order(epoch)
            assert np.array_equal(np.sort(order), np.arange(len(one)))
            for step in range(one.steps(32)):
                for rank in range(2):
                    assert_same_step(one.step(order, step, 32, rank, 2), other.step(order, step, 32, rank, 2))
    held = shards_held(tmp_path)
    assert LANES <= len(held) <= HELD + 2  # of unequal sizes
    assert len(bucket.keys("out/stores/remote.events")) == SHARDS


def test_queries_and_baselines_are_those_of_the_whole_store(whole: Config, tmp_path: Path) -> None:
    store, parts = ensure_store(whole), ensure_store(sharded(whole, "parts"))
    for split in ("val", "test"):
        one, other = store.queries(split), parts.queries(split)  # type: ignore[arg-type]
        for left, right in ((one.targets(), other.targets()), (one.seen(), other.seen())):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
        assert baseline_rows(store, split, whole.evaluate) == baseline_rows(parts, split, whole.evaluate)  # type: ignore[arg-type]


def test_training_on_remote_shards_equals_local_ones_and_resumes(whole: Config, bucket: Bucket, tmp_path: Path) -> None:
    class PowerCut(Exception):
        """Ends a run from outside the training code."""

    def cut(metrics: object) -> None:
        raise PowerCut

    whole = whole.override({"train.epochs": 2})
    unbroken = fit(sharded(whole, "local"))
    config = remote(whole, bucket, "cut", tmp_path)
    ensure_store(config)
    with pytest.raises(PowerCut):
        fit(config, trial=Trial("t1", Folder.at(bucket.uri("search")), cut))
    resumed = fit(config, trial=Trial("t1", Folder.at(bucket.uri("search"))))
    assert same_weights(unbroken, resumed)
    assert resumed.metrics["test/ndcg@10"] == unbroken.metrics["test/ndcg@10"]
    assert resumed.metrics["baselines"] == unbroken.metrics["baselines"]
    assert not same_weights(unbroken, fit(whole))  # the order of the shards is another one


def same_weights(one: Bundle, other: Bundle) -> bool:
    return all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


def test_two_workers_see_what_one_sees(whole: Config, tmp_path: Path) -> None:
    histories = []
    for world in (1, 2):
        job = job_of(sharded(whole, f"world{world}", **{"train.epochs": 2}), tmp_path)
        assert run_workers(job.plain(), world, tmp_path) == [None] * world
        histories.append(progress_in(Path(job.run_folder))["history"])
    for one, other in zip(*histories, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)


def test_a_worker_keeps_to_its_lanes() -> None:
    samples = np.full(64, 32)
    order = lane_order(samples, np.random.default_rng(0))
    for world in (2, 8, 16, 32):
        read = {rank: set((order[rank::world] // 32).tolist()) for rank in range(world)}
        assert max(len(shards) for shards in read.values()) == max(64 // world, 64 // LANES)
    open_at_once = [len(set((order[start : start + 64] // 32).tolist())) for start in range(0, len(order), 64)]
    assert max(open_at_once) == LANES


def test_a_changed_shard_is_refused(whole: Config, bucket: Bucket, tmp_path: Path) -> None:
    config = remote(whole, bucket, "flipped", tmp_path)
    store = ensure_store(config)
    key = bucket.keys("out/stores/flipped.events")[0]
    content = bucket.read(key)
    bucket.write(key, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{Path(key).name} does not match"):
        store.items[np.arange(len(store.items))]


def test_a_cache_too_small_to_train_from_is_told(whole: Config, bucket: Bucket, tmp_path: Path) -> None:
    config = remote(whole, bucket, "small", tmp_path).override({"cluster.cache_shards_gib": 1e-5})
    with pytest.raises(DataError, match=r"cluster\.cache_shards_gib"):
        ensure_store(config)


def test_what_needs_the_whole_log_is_refused(whole: Config) -> None:
    for change in ({"train.samples": "prefixes"}, {"train.half_life_days": 3.0}, {"model.type": "bsarec"}):
        with pytest.raises(ConfigError, match=r"data\.store_shards"):
            fit(sharded(whole, "refused").override(change))


def test_preparing_again_puts_the_same_files(whole: Config, tmp_path: Path) -> None:
    config = sharded(whole, "twice")
    store = ensure_store(config)
    before = sorted(Path(events_location(config.data.store)).iterdir())
    write_log(tmp_path, num_users=240)  # the same content at another time
    again = ensure_store(config)
    assert sorted(Path(events_location(config.data.store)).iterdir()) == before
    assert again.manifest["content_sha256"] == store.manifest["content_sha256"]
    assert isinstance(SequenceStore(again.folder).offsets, np.ndarray)
