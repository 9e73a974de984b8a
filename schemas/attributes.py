"""The attributes of a store: its configuration and origin in readable form, and a hash to compare."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from densefeat.layout import ATTRIBUTES_KEY, COMPACT_FORMAT_VERSION, FORMAT_VERSION
from densefeat.rows.retired import Retired
from schemas.configuration import StoreConfiguration, differences

_ABSENT_IF_NONE = ("compact", "backbone_license", "retired")


@dataclass(frozen=True)
class AppendedSource:
    """Images that were appended to a store. They are not in its configuration, whose hash all records carry.

    Attributes:
        images: absolute path or URI of the dataset, as given.
        rows: number of images that were new.
        keys_sha256: SHA-256 (hex) of their keys, in order.
    """

    images: str
    rows: int
    keys_sha256: str


@dataclass(frozen=True)
class StoreAttributes:
    """Attributes of the root group.

    Attributes:
        configuration: everything that the features depend on.
        versions: of the software that set up the store.
        class_names: names of the labels in the index; empty if there are none.
        explained_variance: share of the low-resolution features' variance that the k components keep, 0 … 1.
        step_sha256: SHA-256 (hex) of the quantization steps; None for float16.
        compact: of a compact store: ``size`` [H, W] of the features, ``last_step`` to get them
            (`densefeat.torch.LastStep`), and ``guidance`` [H, W] of the guidance images, if it needs them.
        appended: sources that were appended to the first one, in order.
        backbone_license: of the backbone's published weights, as timm names it; None if unknown.
        retired: where the list of rows is that are out of use; None if there are none.
        setup_complete: False from the claim of the store until arrays and index are written.
        format_version: version of the layout.
    """

    configuration: StoreConfiguration
    versions: dict[str, str]
    class_names: tuple[str, ...] = ()
    explained_variance: float | None = None
    step_sha256: str | None = None
    compact: Mapping[str, Any] | None = None
    appended: tuple[AppendedSource, ...] = ()
    backbone_license: str | None = None
    retired: Retired | None = None
    setup_complete: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Set the version of compact stores: earlier readers would take their components for features."""
        if self.compact is not None:
            object.__setattr__(self, "format_version", COMPACT_FORMAT_VERSION)

    @property
    def hash(self) -> str:
        """The configuration hash."""
        return self.configuration.hash

    @property
    def rows(self) -> int:
        """Number of images of all sources."""
        return self.configuration.source.rows + sum(source.rows for source in self.appended)

    @property
    def sources(self) -> tuple[str, ...]:
        """Locations of all sources."""
        return (self.configuration.source.images, *(source.images for source in self.appended))

    def completed(self) -> "StoreAttributes":
        """Return a copy with ``setup_complete`` set."""
        return replace(self, setup_complete=True)

    def to_dict(self) -> dict[str, Any]:
        """Convert to the ``attributes`` of the root group."""
        own = dict(self.__dict__)
        own["appended"] = [asdict(source) for source in self.appended]
        if not self.appended:
            del own["appended"]
        own["retired"] = None if self.retired is None else asdict(self.retired)
        own = {name: value for name, value in own.items() if value is not None or name not in _ABSENT_IF_NONE}
        own |= {"configuration": self.configuration.to_dict(), "class_names": list(self.class_names)}
        return {ATTRIBUTES_KEY: {**own, "configuration_hash": self.hash}}

    @classmethod
    def from_dict(cls, own: Mapping[str, Any]) -> "StoreAttributes":
        """Build from the result of ``densefeat.store.read_attributes``.

        Raises:
            ValueError: the attributes are damaged; the message says what is wrong.
        """
        fields = {name: value for name, value in own.items() if name != "configuration_hash"}
        try:
            fields["configuration"] = StoreConfiguration.from_dict(fields["configuration"])
            fields["class_names"] = tuple(fields["class_names"])
            fields["appended"] = tuple(AppendedSource(**source) for source in fields.get("appended", ()))
            fields["retired"] = Retired(**fields["retired"]) if "retired" in fields else None
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def unlikenesses(
    one: StoreAttributes, other: StoreAttributes, sides: tuple[str, str] = ("stored", "asked")
) -> list[str]:
    """Reasons why the rows of two stores cannot be in one, one line each; empty if they can.

    Args:
        one: attributes of one of them.
        other: attributes of the other, whose basis is fitted and whose steps are known.
        sides: what the two are called.
    """
    return differences(_of_rows(one), _of_rows(other), sides=sides)


def _of_rows(attributes: StoreAttributes) -> dict[str, Any]:
    compact = {} if attributes.compact is None else {"compact": attributes.compact}
    return {**attributes.configuration.of_rows(), "step_sha256": attributes.step_sha256, **compact}
