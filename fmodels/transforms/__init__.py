"""Transforms of parameter trees: pure, by letter or path of the axes table, the same for all families."""
