"""What every test process needs before Ray is first imported."""

import os

# Ray reads this once, at import, and a local head of pedro listens on loopback alone.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
