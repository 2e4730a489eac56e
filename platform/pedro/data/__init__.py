"""A tenant's data: read, checked, rendered, tokenised and split. Needs no model, no tensor and no Ray.

lines.py             a file -> its lines, safely
row_shapes.py        one row -> training examples; turns.py, tool_calls.py and preferences.py read what is in it
prompt_format.py     messages -> prompt text -> ids; example_text.py writes an example's prompt and answer
templates.py         Jinja, in a sandbox; template_worker.py runs strangers' templates within bounds
call_syntax.py       how families of templates write calls of tools
special_tokens.py    content never makes control tokens
dataset.py           a file -> rows on disk, splits
check.py             what `pedro data check` reports; masks.py shows its rows as training sees them
demo.py              the packaged tenants
"""

from pedro.data.check import DataReport, check_file
from pedro.data.dataset import RowCounts, Splits, collate, data_digest, load_rows, row_counts, split
from pedro.data.demo import CHAT_TENANTS, DEMO_TENANTS, DemoTenant, demo_tenant
from pedro.data.lines import scan, shape_of
from pedro.data.masks import MaskedRow, show_masks
from pedro.data.mistakes import LineError
from pedro.data.prompt_format import FORMATS, PromptFormat, encode_completion, encode_prompt, format_for_shape
from pedro.data.row_shapes import Example, RowShape, parse_line

__all__ = [
    "CHAT_TENANTS",
    "DEMO_TENANTS",
    "FORMATS",
    "DataReport",
    "DemoTenant",
    "Example",
    "LineError",
    "MaskedRow",
    "PromptFormat",
    "RowCounts",
    "RowShape",
    "Splits",
    "check_file",
    "collate",
    "data_digest",
    "demo_tenant",
    "encode_completion",
    "encode_prompt",
    "format_for_shape",
    "load_rows",
    "parse_line",
    "row_counts",
    "scan",
    "shape_of",
    "show_masks",
    "split",
]
