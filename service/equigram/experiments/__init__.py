"""Experiments of the theory: each writes data, a table (CSV) and a figure (PNG, SVG), and goes on when interrupted."""
