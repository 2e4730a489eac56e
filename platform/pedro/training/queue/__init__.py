"""The job queue: the controller, which starts drivers when their resources are free, and its rules."""
