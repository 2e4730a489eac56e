"""The evaluator of alert rules gives what Prometheus says that it does."""

from __future__ import annotations

import math
import shutil
import subprocess

import pytest
import yaml
from promql import Series, Value, evaluate, parse

TRIED = Series()
for _at in range(0, 1200, 15):
    TRIED.scrape(
        _at,
        {
            ("up", (("job", "pedro"),)): 1.0,
            ("c_total", (("job", "pedro"), ("k", "a"))): (_at // 15 * 7) % 300,  # which begins anew
            ("c_total", (("job", "pedro"), ("k", "b"))): _at / 3,
            ("g", (("k", "a"),)): 5.0 + _at / 100,
            ("g", (("k", "b"),)): 6.0,
            ("h", (("k", "a"),)): 6.0,
            ("s_bucket", (("le", "1.0"),)): _at * 1.0,
            ("s_bucket", (("le", "5.0"),)): _at * 3.0,
            ("s_bucket", (("le", "+Inf"),)): _at * 4.0,
            **({("gone", (("k", "a"),)): 1.0} if _at < 300 else {}),
        },
    )
EXPRESSIONS: dict[str, Value] = {
    'up{job="pedro"} == 1': {(("job", "pedro"),): 1.0},
    'up{job="pedro"} == 0': {},
    'absent(up{job="pedro"})': {},
    'absent(none{job="pedro"})': {(("job", "pedro"),): 1.0},
    "gone": {},
    "g > 6": {(("k", "a"),): 5.0 + 1185 / 100},
    "g > 6 and on (k) h": {(("k", "a"),): 5.0 + 1185 / 100},
    "h unless on (k) g": {},
    "g unless h": {(("k", "b"),): 6.0},
    "h == h": {(("k", "a"),): 6.0},
    "2 * sum(h) + 1": {(): 13.0},
    "sum by (k) (g / g)": {(("k", "a"),): 1.0, (("k", "b"),): 1.0},
    'increase(c_total{k="b"}[5m])': {(("job", "pedro"), ("k", "b")): 100.0},
    'rate(c_total{k="b"}[5m])': {(("job", "pedro"), ("k", "b")): 1 / 3},
    "min_over_time(h[10m])": {(("k", "a"),): 6.0},
    'predict_linear(g{k="a"}[10m], 1000)': {(("k", "a"),): 5.0 + (1185 + 1000) / 100},
    "histogram_quantile(0.5, sum by (le) (rate(s_bucket[5m])))": {(): 3.0},
    "histogram_quantile(0.9, sum by (le) (rate(s_bucket[5m])))": {(): 5.0},
    "sum(h) / sum(none)": {},
}
AT = 1185.0


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_give_what_prometheus_says_that_they_do(text):
    found, wanted = evaluate(parse(text), TRIED, AT), EXPRESSIONS[text]
    assert found.keys() == wanted.keys()
    assert [found[key] for key in wanted] == pytest.approx([wanted[key] for key in wanted])


@pytest.mark.parametrize(
    "text", ["up[5m", "up{job}", "deriv(up[5m])", "up offset 5m", "1 == 1", "quantile(up)", "up up"]
)
def test_what_is_not_evaluated_here_is_an_error(text):
    with pytest.raises((ValueError, IndexError)):
        evaluate(parse(text), TRIED, AT)


def test_promtool_agrees_where_there_is_one(tmp_path):
    """Expressions and rules over the same readings."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool")
    inputs = []
    for name, known in TRIED.of.items():
        for labels, readings in known.items():
            at = dict(zip(readings.times, readings.values, strict=True))
            values = [at.get(when * 15.0, 0) for when in range(80)]
            words = [
                "_" if value is None or when * 15.0 not in at else repr(value) for when, value in enumerate(values)
            ]
            if None in at.values():
                words[words.index("_")] = "stale"
            shown = ", ".join(f'{label}="{text}"' for label, text in labels)
            inputs.append({"series": f"{name}{{{shown}}}", "values": " ".join(words)})
    checks = []
    for text in (*EXPRESSIONS, 'increase(c_total{k="a"}[5m])', 'rate(c_total{k="a"}[4m])', "sum(rate(c_total[3m]))"):
        found = evaluate(parse(text), TRIED, AT)
        assert not isinstance(found, float)
        samples = [
            {"labels": "{" + ", ".join(f'{label}="{word}"' for label, word in key) + "}", "value": _rounded(value)}
            for key, value in found.items()
        ]
        checks.append({"expr": f"round({text}, 0.001)", "eval_time": f"{AT:.0f}s", "exp_samples": samples})
    told = {
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": inputs, "promql_expr_test": checks}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(told))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _rounded(value: float) -> float:
    """As PromQL's `round` does."""
    return math.floor(value * 1000 + 0.5) / 1000
