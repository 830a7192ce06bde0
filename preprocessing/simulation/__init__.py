"""Simulated fields, seasons and images."""
