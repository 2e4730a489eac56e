"""Several jobs of one backbone and method in one worker: one pass over the frozen backbone serves the rows of all.

Each job keeps its own loop, adapter, optimizer, schedule, validation and checkpoints (`training/loop.py` as it is); it
is a participant of a coordinator (`coordinator.py`) and waits there for the others wherever the backbone is read. A
stacked model (`stacked_model.py`) is the backbone with an adapter that is, row by row, the one of the job whose row it
is. `driver.py`, `job_group.py` and `worker.py` run such a group as a Ray job.
"""
