"""vstore: keep many guest trees on one machine, with every file that they share stored once."""

__version__ = "0.1.0"
