"""A training step: its pipeline, engine, fused or portable forms, compilation, optimizers, batch-norm statistics."""
