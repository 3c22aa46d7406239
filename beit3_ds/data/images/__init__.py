"""Reads images and captions from folders, tars and annotation files; decodes and augments images."""
