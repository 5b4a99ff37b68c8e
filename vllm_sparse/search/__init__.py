"""Offline: which pattern for which head of a Hugging Face model. Nothing is imported from here."""
