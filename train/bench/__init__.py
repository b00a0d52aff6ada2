"""Benchmarks: how fast this machine trains, decodes, evaluates and loads.

Comparisons of methods belong in `train.compare`, and whether a run fits a machine in `train.plan`.
"""
