"""Count what a listing did not use, by reason, so that no image or label is dropped silently."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import JobError
from pipeline.images.listing.names import looks_like_image, suffix_of

__all__ = ["About", "Finding", "Tally", "add_unused", "describe_findings", "refuse_losses"]

# image: looks like an image but is not listed. row: listed, but known to fail. other: not needed. label: a label that
# is not used.
About = Literal["image", "row", "other", "label"]

_HEADINGS: dict[About, str] = {"image": "left out", "row": "will fail", "other": "skipped", "label": "no label"}
_SUFFIX = re.compile(r"\.[a-z_][a-z0-9_+-]{0,11}", re.ASCII)
_LINES = 6  # per heading
_EXAMPLE_CHARACTERS = 120


@dataclass(frozen=True)
class Finding:
    """Files, members or labels that were not used, for one reason.

    Attributes:
        about: what it means for the list.
        reason: description, to be read after a number.
        count: how many.
        example: name of the first one.
    """

    about: About
    reason: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.count:,} {self.reason}, e.g. {self.example}"


class Tally:
    """Counts findings; the first one of each reason is its example."""

    def __init__(self, findings: Iterable[Finding] = ()) -> None:
        self._counts: dict[tuple[About, str], int] = {}
        self._examples: dict[tuple[About, str], str] = {}
        for finding in findings:
            self.add(finding.about, finding.reason, finding.example, finding.count)

    def add(self, about: About, reason: str, example: str, count: int = 1) -> None:
        """Add ``count`` to the finding of this kind and reason."""
        if count:
            key = (about, reason)
            self._counts[key] = self._counts.get(key, 0) + count
            if key not in self._examples:
                short = len(example) <= _EXAMPLE_CHARACTERS
                self._examples[key] = example if short else f"{example[:_EXAMPLE_CHARACTERS]}…"

    def findings(self) -> tuple[Finding, ...]:
        """All findings: those about images first, then by count."""
        keys = sorted(self._counts, key=lambda key: (list(_HEADINGS).index(key[0]), -self._counts[key], key[1]))
        return tuple(Finding(*key, self._counts[key], self._examples[key]) for key in keys)


def add_unused(tally: Tally, name: str, example: str) -> None:
    """Count a file or member with an unsupported suffix."""
    suffix = suffix_of(name)
    known = suffix if _SUFFIX.fullmatch(suffix) else "without a suffix"
    if looks_like_image(name):
        tally.add("image", f"images of an unsupported format ({known})", example)
    else:
        tally.add("other", f"files that are not images ({known})", example)


def describe_findings(findings: Sequence[Finding]) -> list[str]:
    """Lines for a plan: the most frequent findings of each kind, and how many more there are."""
    lines = []
    for about, heading in _HEADINGS.items():
        of_kind = [finding for finding in findings if finding.about == about]
        lines += [f"{heading:11} {finding}" for finding in of_kind[:_LINES]]
        if rest := of_kind[_LINES:]:
            lines.append(f"{heading:11} {sum(f.count for f in rest):,} more, for {len(rest)} other reasons")
    return lines


def refuse_losses(images: str, findings: Sequence[Finding], candidates: int, max_share: float) -> None:
    """Refuse a job that would lose more than a given share of its images, before it starts.

    Args:
        images: the dataset, as the user named it.
        findings: of the listing.
        candidates: number of files or rows listed that are, or look like, images.
        max_share: 0 … 1.

    Raises:
        JobError: a greater share would be lost; it says how many, why, and what to do.
    """
    losses = [finding for finding in findings if finding.about in ("image", "row")]
    lost = sum(finding.count for finding in losses)
    if lost <= max_share * candidates:
        return
    reasons = "\n  ".join(map(str, losses))
    raise JobError(
        f"Images {images!r}: {lost:,} of {candidates:,} images ({lost / candidates:.1%}) cannot be used, more than "
        f"--max-failed-share {max_share:g}:\n  {reasons}\n"
        "Convert or repair them, exclude them with a pattern such as '…/*.jpg' (in tars: --image-column jpg), or "
        "set a greater --max-failed-share to continue without them."
    )
