"""A tenant's data: read, checked, rendered, tokenised and split. Knows nothing of models, tensors or Ray.

shapes.py    one JSON line -> examples         lines.py   a file -> its lines, safely
formats.py   messages -> prompt text -> ids    check.py   what `pedro data check` reports
dataset.py   a file -> rows on disk, splits    demo.py    the packaged tenants
templates.py Jinja, in a sandbox               special_tokens.py   content never makes control tokens
                                               template_worker.py  strangers' templates, within bounds
"""

from pedro.data.check import MaskedRow, Report, check_file, show_masks
from pedro.data.dataset import RowCounts, Splits, collate, data_digest, load_rows, row_counts, split
from pedro.data.demo import DEMO_TENANTS, DemoTenant, demo_tenant
from pedro.data.formats import FORMATS, PromptFormat, encode_completion, encode_prompt, format_for_shape
from pedro.data.lines import scan, shape_of
from pedro.data.mistakes import LineError
from pedro.data.shapes import Example, Shape, parse_line

__all__ = [
    "DEMO_TENANTS",
    "FORMATS",
    "DemoTenant",
    "Example",
    "LineError",
    "MaskedRow",
    "PromptFormat",
    "Report",
    "RowCounts",
    "Shape",
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
