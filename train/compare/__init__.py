"""Methods compared on one task with equal budgets; the command is `python -m train.compare`.

Grids of runs, their records, and the table of results belong here. What one run does belongs in `train.run`, speed of
one step in `train.bench`, theory in `train.theory`.
"""
