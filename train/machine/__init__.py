"""Devices, threads, ranks and processes: what a run stands on."""
