"""Pretrains a small backbone from public text. Nothing of the platform needs it; `jobs/pretrain_backbone.py` runs it.

corpus.py     public sources -> documents, and held-out texts     tokens.py    BPE vocabulary, packed windows
prepare.py    what a run's folder was made with, its ids          files.py     whole files or none
schedule.py   learning rate and the end, by tokens and time        loop.py      steps, checkpoints, curve
quality.py    perplexity and bits a character                      publish.py   the directory, its licences, the result
"""
