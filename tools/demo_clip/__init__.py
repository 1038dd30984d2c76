"""The training of the CLIP that comes with the demo, on drawn scenes and their captions."""
