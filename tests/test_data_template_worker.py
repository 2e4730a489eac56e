"""Templates of strangers: what loops, grows or recurses ends within bounds, and nothing else notices."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pedro.data.prompt_format import FORMATS, PromptFormat, check_format
from pedro.data.template_worker import TemplateBoundsError, TemplateWorker
from pedro.errors import DataError

VARIABLES = FORMATS["raw"].variables([{"role": "user", "content": "Hé \ud800"}])
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PLAIN = "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def worker():
    worker = TemplateWorker()
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "0.5 s of computing"),
        ("{{ 'x' * 2000000000 }}", "MB of memory"),
        ("{% set x = ['a' * 50000] %}{% for i in range(99999) %}{{ x[0] }}{% endfor %}", "8,000,000 characters"),
        ("{{ [1] * 10 ** 8 }}", "0.5 s of computing"),
        ("{{ messages[0].content | center(10 ** 9) }}", "MB of memory"),
    ],
)
def test_a_template_that_does_too_much_is_stopped_and_the_next_is_rendered(worker, template, message):
    with pytest.raises(TemplateBoundsError, match=message) as caught:
        worker.render(template, VARIABLES)
    assert caught.value.param == "prompt_format"
    assert worker.render(PLAIN, VARIABLES) == "Hé \ud800"


def test_one_operation_that_takes_for_ever_is_ended_too(worker, monkeypatch):
    monkeypatch.setattr("pedro.data.template_worker.WALL_S", 1.0)
    with pytest.raises(TemplateBoundsError, match=r"did not end|of computing"):
        worker.render("{{ 9 ** (9 ** 9) }}", VARIABLES)  # of hours
    assert worker.render(PLAIN, VARIABLES) == "Hé \ud800"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_of_templates_is_told_no_variable_of_ours(monkeypatch):
    monkeypatch.setenv("PEDRO_DATABASE_URL", "postgresql://user:secret@host/pedro")
    worker = TemplateWorker()
    try:
        assert worker.render(PLAIN, VARIABLES) == "Hé \ud800"
        variables = Path(f"/proc/{worker._worker.process.pid}/environ").read_bytes().split(b"\0")
        assert {name.partition(b"=")[0] for name in variables if name} <= {b"PATH", b"PYTHONPATH", b"LANG"}
    finally:
        worker.close()


def test_what_a_template_refuses_reads_as_it_does_without_a_worker(worker):
    for template in ("{{ raise_exception('no such role') }}", "{% for %}", "{{ messages.append(1) }}"):
        with pytest.raises(DataError) as there:
            PromptFormat("chat", template).render([], worker.render)
        with pytest.raises(DataError) as here:
            PromptFormat("chat", template).render([])
        assert (there.value.message, there.value.param) == (here.value.message, here.value.param)


def test_a_template_beyond_its_bounds_is_refused_before_it_is_trained_or_registered():
    with pytest.raises(TemplateBoundsError):
        check_format(PromptFormat("chat", "{% if messages|length > 30 %}" + LOOPS + "{% endif %}"))
    with pytest.raises(DataError, match="cannot be read"):
        check_format(PromptFormat("chat", "{% for %}"))
    with pytest.raises(DataError, match="200,000"):
        check_format(PromptFormat("chat", "x" * 200_001))
    for good in (PLAIN, "{{ raise_exception('wants other conversations') }}"):
        assert check_format(PromptFormat("chat", good)).template == good
