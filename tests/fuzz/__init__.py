"""Fuzzing of everything that reads what others wrote: ``python -m tests.fuzz --target gguf``.

A case is a few bytes that a target makes its input from (:mod:`tests.fuzz.targets`). They are drawn
as edits of valid inputs (:mod:`tests.fuzz.edits`) and run until something happens that must not
(:mod:`tests.fuzz.engine`). Interesting cases stay in ``corpus/TARGET`` as regression tests.
"""
