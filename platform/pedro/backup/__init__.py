"""Backups: everything that a home holds as one archive, taken beside running servers and jobs, and put back."""

from pedro.backup.make import Made, make_backup
from pedro.backup.restore import Restored, restore_backup

__all__ = ["Made", "Restored", "make_backup", "restore_backup"]
