"""Studies of what weight updates do to activations, on real models: `python -m train.theory STUDY`.

A study measures, draws and tabulates; the mathematics is in `jaxsteer.theory`.
"""
