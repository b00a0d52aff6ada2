"""Questions asked of a model: answers generated or chosen, scored, kept on disk, and compared.

What a task is (records, rules of scoring) belongs in `train.tasks`; what a run is, in `train.run`.
"""
