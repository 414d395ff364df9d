"""Streaming inference: predictions for a recorded session, its score, and a page to look at."""
