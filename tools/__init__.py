"""Programs for those who develop the package; they aren't installed with it."""
