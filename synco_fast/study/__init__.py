"""Studies: runs of every method, seed and setting in one folder, with a table, paired differences and a plot."""
