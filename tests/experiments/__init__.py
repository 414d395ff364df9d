"""Programs that print a table: kills, faults, ranks, numerics."""
