"""`python -m train CONFIG [path=value ...]`."""

import argparse
import sys

from seqray.command import JSON_FLAG, Flag, run_command
from seqray.config import Config

FRESH_FLAG = Flag("--fresh", "start a new run even when one of this name is unfinished")
ACCEPT_FLAG = Flag("--accept-changes", "go on with the unfinished run though its config, data or code has changed")


def main(config: Config, arguments: argparse.Namespace) -> None:
    """Trains and says where the bundle is."""
    from train.fit import fit
    from train.report import finish_command

    finish_command(fit(config, fresh=arguments.fresh, accept_changes=arguments.accept_changes), arguments)


if __name__ == "__main__":
    about = "Fine-tunes a sequential recommender and writes a bundle; the same command goes on after a kill."
    sys.exit(run_command("train", about, main, (JSON_FLAG, FRESH_FLAG, ACCEPT_FLAG)))
