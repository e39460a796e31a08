"""Experiments of the theory: each writes data, a table (CSV) and a figure (PNG, SVG).

Those that take long (convergence, curves, trainability) go on when they were interrupted; the others take a single
decomposition, and start anew.
"""
