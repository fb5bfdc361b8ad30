"""Grids of runs: the file that describes one, running its cells, and the tables and figures made from them."""
