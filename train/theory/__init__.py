"""Studies of what weight updates do to activations, on real models: `python -m train.theory STUDY`."""
