"""Sweeps: many fine-tuning jobs over a space of settings, the best of which becomes a version.

spec.py      the YAML of `pedro sweep`             trial.py     one trial, through the loop of `pedro submit`
of_api.py    a sweep over HTTP                     tracker.py   states of the trials; their runs in MLflow
variants.py  parameters -> a job's spec, checked   tuning.py    Ray Tune: the next trial, early stopping
planner.py   the parameters of the next trial      job.py       the Ray job: check, tune, register the best
records.py   state that survives a kill            report.py    progress, summary table, figure
launch.py    queues new and resumed sweeps         told.py      events of a job: how each trial ended
"""
