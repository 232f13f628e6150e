"""Copying guests between machines: only what the other side lacks travels."""
