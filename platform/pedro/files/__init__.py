"""Tenants' uploaded files: rows in the store, bytes in the storage. Usable without HTTP, jobs or torch.

files.py             uploads, reads and deletes a file as a whole
contents.py          the bytes, in a folder or at an fsspec URL
names.py             which names, purposes and contents are taken
"""

from pedro.files.contents import Contents
from pedro.files.files import SCRATCH_KEPT_S, FileLimits, Files, Upload
from pedro.files.names import PURPOSES, check_content, check_expiry, check_filename, check_purpose

__all__ = [
    "PURPOSES",
    "SCRATCH_KEPT_S",
    "Contents",
    "FileLimits",
    "Files",
    "Upload",
    "check_content",
    "check_expiry",
    "check_filename",
    "check_purpose",
]
