"""Turns a run folder's JSON into one self-contained HTML page, and its numbers into tables for a terminal."""

from deltaw.report.page import write_report
from deltaw.report.tables import cost_table, data_table, headline, metrics_table, sites_table

__all__ = ["cost_table", "data_table", "headline", "metrics_table", "sites_table", "write_report"]
