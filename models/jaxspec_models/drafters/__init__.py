"""Drafters that are trained for their target, one a file."""
