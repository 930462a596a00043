"""The errors a user can cause. Each message says what was wrong, where, and what to do about it."""

AGAIN = 75
"""Exit status of a run that was told to stop and has saved: start it again and it goes on (EX_TEMPFAIL)."""

BROKEN = 69
"""Exit status of a process that lost another: start the job again (EX_UNAVAILABLE)."""


class ReadJaxError(ValueError):
    """Base of every error that bad input causes; the command line prints it without a traceback.

    Attributes:
        status: the exit status that the command line ends with.
    """

    status = 1


class ConfigError(ReadJaxError):
    """A configuration holds an unknown key, a value of the wrong type, or values that disagree."""


class ImageError(ReadJaxError):
    """A picture cannot be decoded, or is too large to be decoded safely."""


class PromptError(ReadJaxError):
    """A question or conversation cannot be put to the model."""


class CheckpointError(ReadJaxError):
    """A checkpoint or model folder is missing, incomplete, corrupt or not of a known layout."""


class DataError(ReadJaxError):
    """A dataset, one of its files or records, or a dataset's name is missing, unknown or malformed."""


class DataWorkerError(DataError):
    """A process that prepares batches has died; begun again, the run may well go on."""

    status = BROKEN


class LostProcessError(ReadJaxError):
    """Another process of the same job has died, or the network to it."""

    status = BROKEN
