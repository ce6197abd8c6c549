"""The counted cost of the loss's launches: machine code times trips, bytes, a model of time. Needs no GPU."""
