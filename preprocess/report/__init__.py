"""Verdicts as a person reads them: tables, lines of JSON, one page of pictures."""
