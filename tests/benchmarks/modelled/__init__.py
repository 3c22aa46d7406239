"""Tests of the modelled times."""
