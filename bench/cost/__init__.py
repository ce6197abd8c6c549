"""What the launches of the loss cost by count: machine code times trips, bytes, a model of time. No GPU is needed."""
