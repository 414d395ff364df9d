"""Decode and encode video, audio and text."""
