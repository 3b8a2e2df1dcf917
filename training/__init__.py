"""Runnable recipes, and the runtime functions that scripts import from here."""
