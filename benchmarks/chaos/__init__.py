"""The main job on a cluster on this machine, while workers, nodes, drivers, storage and clocks fail for real."""
