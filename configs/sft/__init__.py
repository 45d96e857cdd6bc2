"""Instruction tuning runs."""
