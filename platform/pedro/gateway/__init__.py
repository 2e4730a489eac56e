"""The HTTP room: OpenAI's shapes, keys and errors over a `Backend`. Knows nothing of tensors, Ray or MLflow."""
