"""Opens every page of the dashboard in this process and prints how long each took: `python dashboard/timing.py`.

For the benchmark (`python -m jobs.bench dashboard`), which sets PEDRO_HOME. The first page of a process pays for the
imports, so it is opened twice; MLflow's are made after it, as `pedro dashboard` makes them while the browser opens.
`first` is with empty caches, `cpu` the CPU time in it, `again` with full caches.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import streamlit as st
from streamlit.testing.v1 import AppTest

from pedro.config import Settings
from pedro.registry import Registry

APP = Path(__file__).with_name("app.py")
VIEWS = ("compare", "train", "runs", "sweeps", "activations", "adapters", "usage", "serving", "playground")
PAGES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("overview, with imports", "overview", {}),
    ("overview", "overview", {}),
    *((view, view, {"comparison": "home/synthetic"} if view == "compare" else {}) for view in VIEWS),
    ("compare, of runs", "compare", {"comparison": "mlflow/runs"}),
)
TIMEOUT_S = 120


def main() -> None:
    rows = []
    for index, (name, view, query) in enumerate(PAGES):
        if index == 1:
            Registry.open(Settings.from_env()).connect()
        page = AppTest.from_file(str(APP), default_timeout=TIMEOUT_S)
        if view != "overview":
            page.switch_page(f"views/{view}.py")
        page.query_params.update(query)
        st.cache_data.clear()
        st.cache_resource.clear()
        (first, cpu), (again, _) = _timed(page), _timed(page)
        failed = "; ".join(str(error.value) for error in page.exception)
        rows.append(
            {"page": name, "imports": index == 0, "first_s": first, "cpu_s": cpu, "again_s": again, "failed": failed}
        )
    print(json.dumps(rows))


def _timed(page: AppTest) -> tuple[float, float]:
    """Seconds, and those of them that this process computed: on a busy machine they are fewer."""
    began, used = time.perf_counter(), time.process_time()
    page.run()
    return round(time.perf_counter() - began, 3), round(time.process_time() - used, 3)


if __name__ == "__main__":
    main()
