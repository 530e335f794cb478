"""Tests of the way of a prefetch."""
