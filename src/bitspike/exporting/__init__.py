"""Export: a trained torch model becomes one `*.bitspike` file of integers, which is then compared with the model.

    trace -> observe on calibration pictures -> fold into integer operations -> pack -> run both, compare, or refuse

See docs/export.md for what folds where and where numbers may differ.
"""
from bitspike.exporting.dense import export_detector, export_segmenter
from bitspike.exporting.export import ExportReport, calibrate_norms, explain, export_model
from bitspike.exporting.lower import Layer
from bitspike.exporting.trace import ExportError

__all__ = ["ExportError", "ExportReport", "Layer", "calibrate_norms", "explain", "export_detector", "export_model",
           "export_segmenter"]
