"""Studies: method x seed x setting as a folder of runs, with a table, paired differences and a picture."""
