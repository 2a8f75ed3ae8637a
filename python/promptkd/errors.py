"""The errors a user can meet; each message says what, where, and the way out."""


class PromptKDError(Exception):
    """Base of every error that promptkd raises on purpose.

    Attributes:
        told: another process of the same job reports it already.
    """

    told = False


class ImageError(PromptKDError, ValueError):
    """A picture can't be read; the message names the file."""


class DataError(PromptKDError, ValueError):
    """A folder, list, split or set of labels is not usable as it stands."""


class ModelError(PromptKDError, ValueError):
    """A model is unknown, unavailable, or not of the kind that is needed."""


class CheckpointError(PromptKDError, ValueError):
    """A saved teacher, student, cache or checkpoint does not fit what is asked of it."""


class TrainingError(PromptKDError, RuntimeError):
    """Training can't go on: the loss diverged or the run is not what it should be."""
