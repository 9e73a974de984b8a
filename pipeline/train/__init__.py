"""Training of upsamplers: plan, stages, data, objectives, loop, measurements, checkpoints and results."""
