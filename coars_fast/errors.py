"""Errors that a person can act on: each names the file or the argument, what was found, and the way out.

All inherit :class:`CoarsError` and the standard error that callers already catch.
"""


class CoarsError(Exception):
    """Base of every error that `coars_fast` raises for something its user can mend."""


class ConfigError(CoarsError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(CoarsError, ValueError):
    """A data file is malformed, or holds too little to train on."""


class MissingDataError(DataError, FileNotFoundError):
    """A data file or folder does not exist."""


class ModelError(CoarsError, ValueError):
    """A model folder cannot be used: another architecture, missing or misshapen weights, no tokenizer."""


class MissingModelError(ModelError, FileNotFoundError):
    """A model folder or one of its files does not exist."""


class RunFolderError(CoarsError, OSError):
    """A run folder is in use, belongs to another configuration, or holds a broken checkpoint."""


class NonFiniteError(CoarsError, ArithmeticError):
    """A loss or a gradient is not finite; raised before any weight changes."""


class PagesError(CoarsError, MemoryError):
    """The K/V memory has too few free pages."""


class StaleCacheError(CoarsError, RuntimeError):
    """Cached keys and values belong to a sequence that was released, or to weights that have changed since."""
