"""Workers with uneven parts, or none: the loss and the metrics are those of one process."""

from pathlib import Path

import pytest
from shop_log import shop_config, write_log
from struck import job_of, progress_in, run_workers


@pytest.mark.parametrize(("users", "batch_size"), [(60, 2), (61, 7), (2, 16)], ids=["empty", "uneven", "few_users"])
def test_three_workers_equal_one(tmp_path: Path, users: int, batch_size: int) -> None:
    write_log(tmp_path, num_users=users)
    config = shop_config(tmp_path, train={"epochs": 2, "batch_size": batch_size}, evaluate={"batch_size": 64})
    found = []
    for world in (1, 3):
        job = job_of(config.override({"name": f"by{world}"}), tmp_path)
        assert run_workers(job.plain(), world, tmp_path) == [None] * world
        found.append(progress_in(Path(job.run_folder))["history"])
    for one, three in zip(*found, strict=True):
        assert three["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
        assert three["val/ndcg@10"] == pytest.approx(one["val/ndcg@10"], abs=0.02)
