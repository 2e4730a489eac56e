"""Pretrains a small backbone from public text. Nothing of the platform needs it; `python -m jobs.pretrain` runs it.

corpus.py     public sources -> documents, held-out texts      tokens.py         BPE vocabulary, packed windows
prepare.py    what a run's folder was made with, its ids       files.py          whole files or none
schedule.py   learning rate and the end, by tokens and time    pretrain_loop.py  steps, checkpoints, curve
quality.py    perplexity and bits a character                  publish.py        the directory, licences, result
"""
