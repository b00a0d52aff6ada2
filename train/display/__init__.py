"""What a person sees: the console (progress bars, tables) and plots.

Nothing here knows what a run, a model or a task is; callers hand over numbers and texts.
"""
