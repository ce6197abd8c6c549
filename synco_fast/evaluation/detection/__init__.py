"""Detection transfer: the backbone in torchvision's Faster R-CNN and Mask R-CNN."""
