"""Sharpness-aware minimisation, and above all Stable SAM, for the Hugging Face Trainer."""
