"""Tests of the clients, with real connections to real servers."""
