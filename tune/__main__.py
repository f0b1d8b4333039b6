"""`python -m tune CONFIG [path=value ...]`."""

import argparse
import sys

from seqray.command import JSON_FLAG, Flag, run_command
from seqray.config import Config

FRESH_FLAG = Flag("--fresh", "start a new search even when one of this name is unfinished")
ACCEPT_FLAG = Flag("--accept-changes", "go on with the unfinished search though its config, data or code has changed")


def main(config: Config, arguments: argparse.Namespace) -> None:
    """Searches and says where the winner's bundle is."""
    from train.report import finish_command
    from tune.search import search

    finish_command(search(config, fresh=arguments.fresh, accept_changes=arguments.accept_changes), arguments)


if __name__ == "__main__":
    about = "Searches the hyperparameters of tune.space; the same command goes on after a kill."
    sys.exit(run_command("tune", about, main, (JSON_FLAG, FRESH_FLAG, ACCEPT_FLAG)))
