"""The life of one training run: its program, state, checkpoints, metrics, folder and result.

How a command is typed belongs in the commands above; how an answer is found, in `train.evaluation`.
"""
