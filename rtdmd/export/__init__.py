"""What a run has trained, in the forms that others load."""

from rtdmd.export.command import TARGETS, ExportOptions, export

__all__ = ["TARGETS", "ExportOptions", "export"]
