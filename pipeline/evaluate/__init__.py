"""What features are worth: tasks with labels or without, and intervals of their figures.

One file per task. `data/` opens the features and the labels and puts them on one grid; `report/` writes the result.
"""
