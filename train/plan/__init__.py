"""Will it fit, and how fast: a run's programs compiled for accelerators that are not here, or estimated."""
