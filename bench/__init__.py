"""How fast and how small `vunify` is, beside the programs that link equal files too.

Run as `python -m bench unify` or `python -m bench scale`; see `__main__.py`.
"""
