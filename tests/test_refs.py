"""Models' names: parsed, written and refused."""

import pickle

import pytest

from pedro.errors import NotFoundError
from pedro.refs import ModelRef


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
    with pytest.raises(NotFoundError, match=r"is no adapter name; expected tenant\.adapter"):
        ModelRef.parse(text)
