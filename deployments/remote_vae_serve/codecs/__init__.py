"""Codecs: pixels to JPEG, PNG and mp4."""
