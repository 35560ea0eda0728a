"""The comparison page: one self-contained HTML file, its numbers as JSON, and a model card."""

from vflora.report.card import best_frame, write_card
from vflora.report.page import render_page, write_page
from vflora.report.records import Clip, Comparison, Row

__all__ = ["Clip", "Comparison", "Row", "best_frame", "render_page", "write_card", "write_page"]
