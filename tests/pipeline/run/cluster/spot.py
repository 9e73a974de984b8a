"""A cloud in which there is no spot capacity: Ray's nodes on this machine, but for those."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException


class NoSpotCapacity(FakeMultiNodeProvider):  # type: ignore[misc]
    """Refuses to launch spot nodes as Ray's provider for AWS does."""

    def create_node_with_resources_and_labels(self, node_config: dict[str, Any], *arguments: Any) -> Any:
        if "InstanceMarketOptions" in node_config:
            raise NodeLaunchException("InsufficientInstanceCapacity", "no spot capacity", None)
        return super().create_node_with_resources_and_labels(node_config, *arguments)
