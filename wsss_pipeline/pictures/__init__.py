"""Masks to look at: overlays, contact sheets, the page of an evaluation, a page to look through them."""
