"""Conversions between fmodels and other frameworks, and thin stateful wrappers around the same functions."""
