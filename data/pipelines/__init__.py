"""Image files in, two augmented batches out: torchvision, DALI, or a set held on the device."""
