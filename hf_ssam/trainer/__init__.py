"""The two passes inside the Hugging Face Trainer."""
