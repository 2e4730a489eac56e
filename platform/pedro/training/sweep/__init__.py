"""Sweeps: many fine-tuning jobs over a space of settings, the best of which becomes a version.

spec.py      the YAML of `pedro sweep`             trial.py     one trial, through the loop of `pedro submit`
of_api.py    a sweep that came over HTTP           tracker.py   who runs, who ended how; the runs in MLflow
variants.py  parameters -> a job's spec, checked   tuning.py    Ray Tune: who is next, who is stopped early
planner.py   what the next trial tries             job.py       the Ray job: check, tune, register the best
records.py   what must survive a kill              report.py    progress, summary table, figure
launch.py    into the queue: new ones, resumed ones told.py      events of a job: how each trial ended
"""
