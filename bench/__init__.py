"""Measurements and acceptance runs against real processes. None is part of `make test`, all end by themselves."""
