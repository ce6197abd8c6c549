"""Cost model of the loss kernels without a GPU: instruction counts from machine code, bytes, and modelled time."""
