"""report.html: what verification found, for a reader without cspdeploy, on any screen or on paper."""

from cspdeploy.report.html.page import REPORT_FILE, render_report, write_report
from cspdeploy.report.html.rows import bundle_rows

__all__ = ["REPORT_FILE", "bundle_rows", "render_report", "write_report"]
