"""Class-agnostic regions of images: objects and their parts, superpixels; whoever found them."""
