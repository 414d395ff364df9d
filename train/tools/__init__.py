"""Commands about a configuration or a checkpoint: profile, estimate, ablate and selftest."""
