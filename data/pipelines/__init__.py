"""Pipelines: torchvision, DALI, or a dataset resident on the device."""
