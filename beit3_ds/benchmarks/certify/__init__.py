"""Tests and measures this machine for `beit3 certify`, section by section, and writes a report."""
