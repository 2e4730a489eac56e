"""Turns a tenant's data into an adapter: the training loop, its engines, and the Ray job around them."""
