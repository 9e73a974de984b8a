"""The spec of workers that stand in for those of a job: they build no stages."""

from pipeline.images.decoding.decode import Geometry
from pipeline.run.feature_worker import WorkerSpec
from pipeline.run.recipe import FeatureRecipe, ImageRecipe

_IMAGES = ImageRecipe("folder", None, Geometry((8, 8), "crop", (8, 8)), 64, 1)
SPEC = WorkerSpec(FeatureRecipe(_IMAGES, "none", (0,), "random", "layer", "token", {}), "cpu", None, 1)
