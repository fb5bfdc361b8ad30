"""The parts of `python -m bench.gpu_acceptance`: what each does, in a process of its own.

parts.py         the list; a new part is one entry there and one function
work.py          what a part's function is given, and what it leaves: results, one by one, and its finding
verdict.py       the page that holds the results against what is wanted
"""
