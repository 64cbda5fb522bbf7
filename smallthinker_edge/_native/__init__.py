"""Cython modules: they translate types going in and errors coming out; the computation is C in src/."""
