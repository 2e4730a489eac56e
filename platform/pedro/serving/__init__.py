"""The gateway and the engine as one Ray Serve application, built by `build_app`.

`import_path: pedro.serving:build_app` with `args` as in `pedro.serving.config.ServeConfig`.
"""

from __future__ import annotations


def __getattr__(name: str) -> object:
    if name == "build_app":
        from pedro.serving.app import build_app

        return build_app
    raise AttributeError(f"module 'pedro.serving' has no attribute {name!r}")
