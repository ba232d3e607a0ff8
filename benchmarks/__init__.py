"""Measurements behind every speed the project states; see README.md in this folder."""
