"""Check recorded sessions, report their faults, and repair those with one right repair."""
