"""Masks to look at: overlays, contact sheets, the page of an evaluation."""
