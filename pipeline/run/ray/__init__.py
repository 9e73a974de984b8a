"""Workers on a Ray cluster. With ``pipeline.train.ray_train``, all that imports ray."""
