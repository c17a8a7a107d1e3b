"""Figures and a page that show what a search found; from the plain data of its report."""
from bitspike.reporting.figures import bits_figure, front_figure, save_figures
from bitspike.reporting.page import page, write_page

__all__ = ["bits_figure", "front_figure", "page", "save_figures", "write_page"]
