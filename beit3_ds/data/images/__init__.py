"""Reads images and captions from all kinds of sources; decodes and augments images."""
