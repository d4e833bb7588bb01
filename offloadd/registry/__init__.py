"""What is on disk: model files and what they say of themselves."""
