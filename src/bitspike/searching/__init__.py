"""Search: which layer gets which scheme and how many bits, within a budget. See docs/search.md.

    space (candidates per layer) + costs (bytes, bits, energy) + damage (measured, estimated) -> integer programme -> QuantSpec
"""
from bitspike.searching.budget import Budget
from bitspike.searching.interface import METHODS, Point, SearchReport, search, write_report, write_spec
from bitspike.searching.measure import SearchData
from bitspike.searching.space import CANDIDATES, SearchError, make_space, parse_candidates

__all__ = ["CANDIDATES", "METHODS", "Budget", "Point", "SearchData", "SearchError", "SearchReport", "make_space",
           "parse_candidates", "search", "write_report", "write_spec"]
