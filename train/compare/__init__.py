"""Methods compared on one task with equal budgets; the program is `python -m train.compare`."""
