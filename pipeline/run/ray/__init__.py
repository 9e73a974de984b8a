"""Workers on a Ray cluster. Only this package and ``pipeline.train.ray_train`` import ray."""
