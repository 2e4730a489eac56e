"""The HTTP layer: OpenAI's schemas, API keys and errors over a `Backend`. Imports neither torch nor Ray nor MLflow."""
