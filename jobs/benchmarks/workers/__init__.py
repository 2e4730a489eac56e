"""One engine a file, each a class with `run(order) -> figures`, driven over JSON lines by `workers.__main__`."""
