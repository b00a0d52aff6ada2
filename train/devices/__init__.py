"""What the machine is and how a run is spread over it: processes, placement, machine facts, chips.

Nothing about models, data or training belongs here.
"""
