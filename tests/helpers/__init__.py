"""Oracles, factories, fakes and fault injectors for the tests."""
