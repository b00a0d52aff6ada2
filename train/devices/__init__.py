"""The machine and how a run is spread over it: processes, placement on a mesh, machine facts, chips' published figures.

Models, data and training do not belong here.
"""
