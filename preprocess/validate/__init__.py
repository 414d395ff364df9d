"""What is wrong with a session, and mending what has one right repair."""
