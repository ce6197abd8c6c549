"""Studies over several runs, each with its record in ``bench/records``. Not part of the installed package."""
