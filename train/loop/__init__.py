"""The training loop and all that watches over it."""
