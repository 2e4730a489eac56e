"""Several jobs of one backbone and method in one worker: one pass over the frozen backbone serves the rows of all.

Each job keeps its own loop, adapter, optimizer, schedule, validation and checkpoints (`training/loop.py` unchanged); it
is a participant of a coordinator (`coordinator.py`) and waits there for the others before each pass. A stacked model
(`stacked_model.py`) is the backbone with all jobs' adapters, each applied to its own job's rows. `driver.py`,
`job_group.py` and `worker.py` run such a group as a Ray job.
"""
