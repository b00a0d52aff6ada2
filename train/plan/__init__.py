"""The fit check: does a run fit on a topology, and how fast can it be? Answered without the accelerators.

Compiling, estimating and reporting a run's training step and decoding belong here; measuring them on real devices is
`train.bench`. A steering plan is something else: see `jaxsteer.plans`.
"""
