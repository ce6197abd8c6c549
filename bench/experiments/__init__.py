"""Experiments with several runs, each with a record in ``bench/records``. Not part of the installed package."""
