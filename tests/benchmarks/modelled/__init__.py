"""Tests the modelled times of ops and steps."""
