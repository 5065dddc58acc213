"""The report as one offline HTML page."""

from rgbench.reporting.page.view import page, without_pictures

__all__ = ["page", "without_pictures"]
