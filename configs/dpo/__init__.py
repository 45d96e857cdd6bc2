"""Preference optimization runs."""
