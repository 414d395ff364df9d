"""A session on disk: its files, clock and contents."""
