"""Lets nbval look at the run that the pages were built from, where `make test` asks for it."""

from built_run import pytest_collect_file

__all__ = ["pytest_collect_file"]
