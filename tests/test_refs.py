"""Models' names: parsed, written and refused."""

import pickle
import re
from pathlib import Path

import pytest

from pedro.errors import NotFoundError
from pedro.refs import ModelRef, tenant_of, version_name, without_digest

ROOT = Path(__file__).parents[1]
# f"{tenant}.{adapter}", f"{ref.name}:{version}", name.partition("."), model.rpartition(":")
BY_HAND = re.compile(
    r"""tenant["'\])]*\}\.\{|ref\.name\}[:@]\{|\{name\}(:\{version|@\{which)|startswith\(f"\{tenant\}\."""
    r"""|\b(name|model|ref)\.r?(partition|split)\("[:@#]"|\b(name|model)\.r?partition\("[.]"""
)


@pytest.mark.parametrize(
    ("text", "which", "digest"),
    [
        ("acme.faq", None, ""),
        ("acme.faq@previous", "previous", ""),
        ("acme.faq@7", "7", ""),
        ("acme.faq:7", 7, ""),
        ("a.b:12#sha256:0f", 12, "sha256:0f"),
        ("a-1.b_2#sha256:0f", None, "sha256:0f"),
    ],
)
def test_a_name_is_written_as_it_was_read(text, which, digest):
    ref = ModelRef.parse(text)
    assert (str(ref), ref.which, ref.digest) == (text, which, digest)
    assert ref.name == f"{ref.tenant}.{ref.adapter}" == text.partition("#")[0].partition(":")[0].partition("@")[0]
    assert str(ref.without_digest) == text.partition("#")[0]
    assert pickle.loads(pickle.dumps(ref)) == ref


@pytest.mark.parametrize(
    "text",
    ["", "acme", ".faq", "acme.", "Acme.faq", "acme.faq.x", "acme.faq:", "acme.faq:x", "acme.faq@a:1", "acme.faq:1\n",
     "acme.faq:9999999999", "acme.faq#", f"{'a' * 64}.faq"],
)  # fmt: skip
def test_what_is_no_name_of_an_adapter_is_refused_by_name(text):
    with pytest.raises(NotFoundError, match=r"is not an adapter name; expected tenant\.adapter"):
        ModelRef.parse(text)


def test_a_version_and_the_parts_of_a_name_are_had_from_any_name_of_it():
    ref = ModelRef.parse("acme.faq@previous#sha256:0f")
    assert str(ref.at(3)) == str(ref.at(3).at(3)) == "acme.faq:3"
    assert (tenant_of(str(ref)), without_digest(str(ref))) == ("acme", "acme.faq@previous")
    assert version_name("acme.faq", 3) == "acme.faq:3"
    assert (tenant_of("acme-two.faq"), tenant_of("acme")) == ("acme-two", "")
    assert (tenant_of("acme-two.faq") == "acme", without_digest("stories260K")) == (False, "stories260K")


def test_no_other_file_takes_a_name_apart_or_puts_one_together():
    """`acme` once began `acme-two`, and a digest's colon a version."""
    mine = {"platform/pedro/refs.py", "jobs/benchmarks/synthetic_data.py"}  # the latter makes rows of other programs
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for room in ("platform/pedro", "dashboard", "jobs")
        for path in sorted((ROOT / room).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in mine
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BY_HAND.search(line)
    ]
    assert not found, "\n".join(found)
