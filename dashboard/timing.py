"""Opens every page of the dashboard in this process and prints how long each took: `python dashboard/timing.py`.

For the benchmark (`python -m jobs.bench dashboard`), which sets PEDRO_HOME. The first page of a process pays for the
imports; `first` is with empty caches, `again` with full ones.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import streamlit as st
from streamlit.testing.v1 import AppTest

APP = Path(__file__).with_name("app.py")
VIEWS = ("overview", "compare", "runs", "sweeps", "activations", "adapters", "serving", "playground")
QUERIES: dict[str, dict[str, str]] = {"compare": {"comparison": "home/crowd"}}
TIMEOUT_S = 120


def main() -> None:
    rows = []
    for place, (view, query) in enumerate([*((view, QUERIES.get(view, {})) for view in VIEWS), ("compare", RUNS)]):
        page = AppTest.from_file(str(APP), default_timeout=TIMEOUT_S)
        if view != "overview":
            page.switch_page(f"views/{view}.py")
        page.query_params.update(query)
        st.cache_data.clear()
        st.cache_resource.clear()
        first, again = _timed(page), _timed(page)
        failed = "; ".join(str(error.value) for error in page.exception)
        name = f"{view} (runs)" if query is RUNS else view
        rows.append({"page": name, "imports": place == 0, "first_s": first, "again_s": again, "failed": failed})
    print(json.dumps(rows))


RUNS = {"comparison": "mlflow/runs"}


def _timed(page: AppTest) -> float:
    began = time.perf_counter()
    page.run()
    return round(time.perf_counter() - began, 3)


if __name__ == "__main__":
    main()
