"""What a home keeps and for how long, and the erasure of a tenant: the only package that deletes what others made."""
