"""The demo's own world: drawn scenes with captions and pixel ground truth, the same for the same seed."""
