"""Devices, threads and ranks."""
