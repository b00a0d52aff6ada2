"""Questions put to a model: answers generated or chosen, scored, kept on disk, and compared.

What a task is (records, readers, scoring rules) belongs in `train.tasks`; what a training run is, in `train.run`.
"""
