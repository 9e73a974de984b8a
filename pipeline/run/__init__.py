"""Plan jobs and run them: plans, workers, the task queue.

May import every package above it in the list of `pipeline`. Only ``pipeline.run.ray`` uses Ray.
"""
