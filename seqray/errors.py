"""What a user can get wrong. Commands print these without a traceback and exit with status 2."""


class SeqrayError(Exception):
    """An error of the input, not of the program: the message names the path, the value and the choices."""


class ConfigError(SeqrayError):
    """A configuration file or an override that does not fit the tree."""


class DataError(SeqrayError):
    """A log or an item table that cannot be used as it is."""


class ModelError(SeqrayError):
    """A model whose scores or loss are no numbers."""


class BundleError(SeqrayError):
    """A bundle (or checkpoint) whose files do not match its manifest, or that does not fit what is asked of it."""
