"""Stage two: segmentation networks, the losses and data they are trained with, and the training loop."""
