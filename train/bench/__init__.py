"""Benchmarks: how fast training, decoding, evaluation and loading are on this machine.

Comparisons of methods belong in `train.compare`; what would fit elsewhere, in `train.plan`.
"""
