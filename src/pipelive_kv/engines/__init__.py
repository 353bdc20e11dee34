"""Adapters to inference engines, and a small reference engine."""
