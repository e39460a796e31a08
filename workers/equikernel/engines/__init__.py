"""Engines: the same kernels, computed on different hardware."""
