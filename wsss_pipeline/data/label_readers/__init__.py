"""One file for each form in which image-level labels come.

Each raises a LabelError for another structure, an unsafe image id or an unknown class.
"""
