"""`crosslmm report`: the arms of a sweep in tables, figures and one page."""

from lightning_crosslmm.report.write import write_report

__all__ = ["write_report"]
