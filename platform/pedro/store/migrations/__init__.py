"""The steps of the schema, one file each in `versions`, run by `migrate.py`; released ones are never edited."""
