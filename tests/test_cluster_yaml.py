"""What goes to a cluster: the launcher's file by Ray's own schema and autoscaler, and the upload by Ray's packaging."""

import copy
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
KEPT = ("train/fit.py", "seqray/config.py", "configs/shop.yaml", "items.csv", "my_model.py")
LEFT = (
    ".git/config", ".venv/bin/python", ".seqray/runs/shop/r1/run.json", "data/log.csv", "outputs/x.json", "log.parquet",
    "wandb/offline-run/run.wandb", "train/__pycache__/fit.pyc", ".mypy_cache/x", "model.safetensors", ".env",
)  # fmt: skip


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_launcher_takes_it(launcher: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    validate_config(prepare_config(copy.deepcopy(launcher)))
    mistaken = copy.deepcopy(launcher)
    mistaken["available_node_types"]["gpu_spot"]["max_worker"] = 3
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(mistaken))


def test_versions_are_those_of_the_constraints(launcher: dict[str, Any]) -> None:
    for image in (launcher["docker"]["image"], launcher["docker"]["head_image"]):
        assert re.fullmatch(rf"rayproject/ray:{re.escape(pins()['ray'])}-py311(-gpu)?", image)
    [setup] = launcher["setup_commands"]
    assert "-c constraints.txt" in setup
    for mounted in ("pyproject.toml", "constraints.txt"):
        assert launcher["file_mounts"][f"~/seqray-setup/{mounted}"] == f"./{mounted}"


def test_setup_asks_for_what_the_project_needs_and_no_more(launcher: dict[str, Any], tmp_path: Path) -> None:
    [setup] = launcher["setup_commands"]
    program = re.search("python -c '(.*?)'", setup, re.DOTALL)
    assert program is not None
    done = subprocess.run([sys.executable, "-c", program[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {re.split(r"[\[>=<]", line)[0] for line in done.stdout.split()}
    assert {"torch", "pyarrow", "ray", "optuna", "peft"} <= names
    assert not {"pytest", "moto", "mypy"} & names


def test_tokens_are_on_and_no_port_is_open(launcher: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert "~/.ray/auth_token" in launcher["file_mounts"]
    [start] = [command for command in launcher["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    [join] = [command for command in launcher["worker_start_ray_commands"] if "ray start" in command]
    assert "--address=$RAY_HEAD_IP:6379" in join
    assert launcher["provider"]["use_internal_ips"] is True
    # Without groups of the user's own the launcher makes one that lets the whole internet in at port 22.
    assert "security_group" not in launcher["provider"]
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in launcher["available_node_types"].values())
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()  # noqa: S104


def wanted(launcher: dict[str, Any], failed: dict[str, float]) -> dict[str, int]:
    """Node type -> how many Ray's autoscaler launches for eight workers with a GPU each; failed: could not be had."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(copy.deepcopy(launcher), skip_content_hash=True)
    gpus = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 4, "GPU": 1}) for _ in range(8)])
    request = SchedulingRequest(
        disable_launch_config_check=True, node_type_configs=config.get_node_type_configs(), resource_requests=gpus,
        max_num_nodes=config.get_max_num_nodes(), recoverable_resource_availabilities=failed,
    )  # fmt: skip
    reply = ResourceDemandScheduler(None).schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_gpu_nodes_come_from_zero_as_spot_and_on_demand_when_there_is_none(launcher: dict[str, Any]) -> None:
    assert wanted(launcher, {}) == {"gpu_spot": 2}
    assert wanted(launcher, {"gpu_spot": 0.0}) == {"gpu_on_demand": 2}


def test_the_upload_of_a_job_leaves_data_and_outputs_here(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "checkout"
    for name in (*KEPT, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name in (".rayignore", ".gitignore"):
        (folder / name).write_text((ROOT / name).read_text())
    create_package(str(folder), tmp_path / "p.zip", include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(tmp_path / "p.zip") as package:
        packed = {name for name in package.namelist() if not name.endswith("/")}
    assert packed == {*KEPT, ".rayignore", ".gitignore"}
