"""A creature lives through a session, tick by tick."""
