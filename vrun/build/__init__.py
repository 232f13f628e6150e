"""Build guests: the steps that all ways to build share, and a module for each way."""
