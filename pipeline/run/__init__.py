"""Who does the work, and when: plans, workers, the queue of tasks.

May import every room above it in the list of `pipeline`. Only ``pipeline.run.ray`` knows Ray.
"""
