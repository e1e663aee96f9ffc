"""Calibration sequences for PTQ: traces of a model or given texts, packed into rows of equal length."""
