"""Turns a tenant's data into an adapter: the worker loop, its engines, and the Ray job around them."""
