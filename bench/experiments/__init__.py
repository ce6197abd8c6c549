"""Experiments of several runs, each with a record in ``bench/records``; not part of the installed package."""
