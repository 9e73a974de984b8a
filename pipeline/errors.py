"""Errors of bad input: of the whole job, or of one image."""

from densefeat.errors import DensefeatError

__all__ = ["ImageError", "JobError", "TrainingDiverged"]


class JobError(DensefeatError):
    """The job cannot run as requested. Raised before work starts if possible."""


class TrainingDiverged(JobError):  # noqa: N818 - says what happened
    """The loss or its gradient is not finite; the message says what was kept and which images were involved."""


class ImageError(DensefeatError):
    """One image cannot be used; its row is marked as failed and the job continues.

    Attributes:
        status: one of ``schemas.index.FAILED``: ``unreadable`` (bytes could not be fetched), ``corrupt``,
            ``unsupported``, ``too_large``, ``too_small``, ``nonfinite`` (non-finite features), ``constant`` (no
            variation to fit), ``diverged`` (the fit of its features diverged), ``crashed`` (its worker crashed or
            hung with it, every time).
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        """Pickle with all arguments, because errors are passed between Ray workers."""
        return (type(self), (self.status, str(self)))
