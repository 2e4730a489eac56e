"""Compares methods: from a spec to runs, one JSON each, and from those to tables and figures with honest intervals."""
