"""What users see: the console (progress bars, aligned facts) and plots.

Nothing here knows about runs, models or tasks; callers pass numbers and text.
"""
