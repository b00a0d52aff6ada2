"""Benchmarks: how fast this machine trains, decodes, evaluates and loads.

On accelerators, `accelerator` measures all of it in stages. Comparisons of methods belong in `train.compare`, and
whether a run fits a machine in `train.plan`.
"""
