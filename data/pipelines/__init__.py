"""Data pipelines: torchvision, DALI, or a dataset resident on the device."""
