"""One file for each form in which image-level labels come."""
