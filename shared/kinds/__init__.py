"""The four kinds of streams: one module each, with what every program needs of a kind."""
