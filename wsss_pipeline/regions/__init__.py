"""Class-agnostic regions of images: objects and their parts, superpixels; whoever found them."""


def open_regions(name):  # type: ignore
    raise NotImplementedError
