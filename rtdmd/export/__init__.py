"""What a run has trained, in the forms that others load."""

from rtdmd.export.command import TARGETS, ExportOptions, export
from rtdmd.export.hub import HubOptions

__all__ = ["TARGETS", "ExportOptions", "HubOptions", "export"]
