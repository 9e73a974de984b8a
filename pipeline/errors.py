"""The two ways in which input can be bad: the whole job's, or one image's."""

from densefeat.errors import DensefeatError

__all__ = ["ImageError", "JobError", "TrainingDiverged"]


class JobError(DensefeatError):
    """The job cannot run as asked. Raised before work starts where that is possible; jobs exit with code 2."""


class TrainingDiverged(JobError):  # noqa: N818 - says what happened
    """The loss or its gradient is not finite; what was kept, and which images it was, is in the text."""


class ImageError(DensefeatError):
    """One image cannot be used; its row is marked failed and everything else goes on.

    Attributes:
        status: one of ``schemas.index.FAILED``: ``unreadable`` (bytes could not be fetched), ``corrupt``,
            ``unsupported``, ``too_large``, ``too_small``, ``nonfinite`` (its features are), ``constant`` (nothing in
            it to fit), ``diverged`` (the fit of its features did).
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        """Pickle whole: errors cross Ray workers."""
        return (type(self), (self.status, str(self)))
