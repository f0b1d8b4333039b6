"""How a search goes: what is drawn, and which trials are stopped."""

from typing import Any

import optuna
import ray.tune
import ray.tune.schedulers
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from seqray.config import Config
from seqray.program_config import Distribution


class Asha(ray.tune.schedulers.ASHAScheduler):  # type: ignore[misc]
    """ASHA (Li et al. 2020) that never stops a trial whose training is over.

    Such a trial has yet to rank the test targets and to write its bundle. Time is counted in epochs, so that a trial
    that was interrupted goes on where it stood.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP after a validation."""
        if result["training_over"]:
            return str(self.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))


def tune_config(config: Config, at_once: int) -> ray.tune.TuneConfig:
    """Sampler, scheduler and number of trials, as Ray Tune takes them; `at_once` trials run at a time."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tune, monitor, epochs = config.tune, config.train.monitor, config.train.epochs
    sampler: Any = BasicVariantGenerator(random_state=config.seed)
    if tune.search == "optuna":
        sampler = OptunaSearch(seed=config.seed, metric=monitor, mode="max")
    asha = Asha(
        time_attr="epoch",
        max_t=epochs + 1,
        grace_period=min(tune.grace_validations * config.train.evaluate_every, epochs),
        reduction_factor=tune.reduction_factor,
    )
    return ray.tune.TuneConfig(
        metric=monitor,
        mode="max",
        num_samples=tune.num_trials,
        max_concurrent_trials=at_once,
        search_alg=sampler,
        scheduler=asha if tune.scheduler == "asha" else None,
    )


def domain(distribution: Distribution) -> Any:
    """The distribution as Ray Tune has it."""
    if distribution.choice is not None:
        return ray.tune.choice(list(distribution.choice))
    if distribution.uniform is not None:
        return ray.tune.uniform(*distribution.uniform)
    if distribution.loguniform is not None:
        return ray.tune.loguniform(*distribution.loguniform)
    assert distribution.randint is not None
    low, high = distribution.randint
    return ray.tune.randint(low, high + 1)
