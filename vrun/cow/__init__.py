"""Copy-on-write links at run time: a guest that may write to its unified files."""
