"""One trial: the very `fit` of a train run, with some values of the config replaced."""

from collections.abc import Mapping
from typing import Any


def run_trial(sample: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Runs in the trial's own process; `sample` holds dotted paths and values, `job` the config and the folders.

    A run with one worker stays in this process. With more it becomes a nested Ray Train run, whose validations a
    callback brings to Ray Tune.
    """
    import ray.tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from seqray.config import Config
    from seqray.folder import Folder
    from train.fit import Trial, fit

    config = Config.parse(job["config"]).override(sample, "sample")
    search = Folder.at(job["search"])
    trial_id = f"{search.name}-{ray.tune.get_context().get_trial_id()}"
    if config.train.max_workers > 1:
        trial = Trial(trial_id, search, ray_callbacks=(TuneReportCallback(),))
    else:
        config = config.override({"train.num_workers": 0})
        trial = Trial(trial_id, search, on_validation=lambda metrics: ray.tune.report(dict(metrics)))
    fit(config, accept_changes=job["accept_changes"], trial=trial)
