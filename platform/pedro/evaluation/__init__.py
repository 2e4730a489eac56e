"""Says how good an adapter is: generation from the prompt alone, exact match, loss."""
