"""The creature, what it is measured by, and the trivial predictors beside it."""
