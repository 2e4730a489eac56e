"""Jobs that wait their turn: the controller, which starts one driver when its resources are free, and what it asks."""
