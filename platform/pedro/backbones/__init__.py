"""The backbones of a home: pulled by name or hub id, added from a directory or a GGUF file, removed.

What is kept here is an ordinary transformers directory with its origin beside it; `pedro.backbone` finds and loads it.
"""
